"""Triton kernel for the generalised Jensen-Shannon divergence of two rows of logits: three sweeps
on chip, one launch.

Sweep 1 normalises both rows, sweep 2 sums the divergences, sweep 3 writes the student's gradient;
with few enough programs the later sweeps read from the L2 cache. Categories with probability 0 on
one side or both count 0, never NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import fill_zero, row_sums


@triton.jit
def _log_probs(row, columns, count, highest, log_total, INVERSE_TEMPERATURE: tl.constexpr):
    """Log-probs of one tile, -inf beyond `count`."""
    logits = tl.load(row + columns, mask=columns < count, other=float("-inf")).to(tl.float32)
    return (logits - highest) * INVERSE_TEMPERATURE - log_total


@triton.jit
def _log_ratio(p, log_p, log_other):
    """p * log(p / other), 0 where p is 0 (also where both logarithms are -inf)."""
    return tl.where(p == 0.0, 0.0, p * (log_p - log_other))


@triton.jit
def _log_mixture(q, t, log_q, log_t, BETA: tl.constexpr):
    """log m; at the ends of beta the other side's log-prob itself, so that nothing underflows."""
    if BETA == 0.0:
        return log_q
    elif BETA == 1.0:
        return log_t
    else:
        return tl.log(BETA * t + (1.0 - BETA) * q)


@triton.jit
def jsd_kernel(
    student,
    teacher,
    gradient,
    mask,
    divergences,
    entropies,
    scale,
    rows,
    vocabulary,
    shared,
    student_stride,
    teacher_stride,
    gradient_stride,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`scale` points to one float32; `shared` columns exist in both vocabularies, the teacher is 0
    in the student's others.
    """
    columns = tl.arange(0, BLOCK)
    index = tl.program_id(0).to(tl.int64)
    while index < rows:
        student_row, teacher_row = (
            student + index * student_stride,
            teacher + index * teacher_stride,
        )
        gradient_row = gradient + index * gradient_stride
        if tl.load(mask + index) == 0:
            tl.store(divergences + index, 0.0)
            tl.store(entropies + index, 0.0)
            if HAS_GRADIENT:
                fill_zero(gradient_row, vocabulary, BLOCK)
        else:
            student_max, student_sum, weighted = row_sums(
                student_row, vocabulary, INVERSE_TEMPERATURE, BLOCK
            )
            teacher_max, teacher_sum, _ = row_sums(teacher_row, shared, INVERSE_TEMPERATURE, BLOCK)
            student_log, teacher_log = tl.log(student_sum), tl.log(teacher_sum)
            from_teacher = tl.zeros((BLOCK,), tl.float32)
            from_student = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                here = start + columns
                log_q = _log_probs(
                    student_row, here, vocabulary, student_max, student_log, INVERSE_TEMPERATURE
                )
                log_t = _log_probs(
                    teacher_row, here, shared, teacher_max, teacher_log, INVERSE_TEMPERATURE
                )
                q, t = tl.exp(log_q), tl.exp(log_t)
                log_m = _log_mixture(q, t, log_q, log_t, BETA)
                if BETA < 1.0:
                    from_teacher += _log_ratio(t, log_t, log_m)
                if BETA > 0.0:
                    from_student += _log_ratio(q, log_q, log_m)
            teacher_kl, student_kl = tl.sum(from_teacher, axis=0), tl.sum(from_student, axis=0)
            if BETA == 0.0:
                tl.store(divergences + index, teacher_kl)
            elif BETA == 1.0:
                tl.store(divergences + index, student_kl)
            else:
                tl.store(divergences + index, BETA * teacher_kl + (1.0 - BETA) * student_kl)
            tl.store(entropies + index, student_log - weighted / student_sum)
            if HAS_GRADIENT:
                factor = tl.load(scale) * INVERSE_TEMPERATURE
                for start in range(0, vocabulary, BLOCK):
                    here = start + columns
                    log_q = _log_probs(
                        student_row, here, vocabulary, student_max, student_log, INVERSE_TEMPERATURE
                    )
                    log_t = _log_probs(
                        teacher_row, here, shared, teacher_max, teacher_log, INVERSE_TEMPERATURE
                    )
                    q, t = tl.exp(log_q), tl.exp(log_t)
                    if BETA == 0.0:
                        values = q - t
                    elif BETA == 1.0:
                        values = _log_ratio(q, log_q, log_t) - q * student_kl
                    else:
                        log_m = _log_mixture(q, t, log_q, log_t, BETA)
                        values = (1.0 - BETA) * (_log_ratio(q, log_q, log_m) - q * student_kl)
                    if SHARES_STORAGE:
                        tl.debug_barrier()
                    tl.store(
                        gradient_row + here,
                        (factor * values).to(gradient.dtype.element_ty),
                        mask=here < vocabulary,
                    )
        index += tl.num_programs(0)
