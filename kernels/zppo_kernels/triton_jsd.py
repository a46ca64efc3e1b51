"""Triton kernel for the generalised Jensen-Shannon divergence of two rows of logits: three sweeps
on chip, one launch.

Sweep 1 normalises both rows, sweep 2 sums the divergences, sweep 3 writes the student's gradient;
with few enough programs the later sweeps read from the L2 cache. Logarithms are base 2 inside.
Categories with probability 0 on one side or both count 0, never NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_sweeps import (
    LN_2,
    LOWEST,
    body_of,
    exp2,
    exponent_scale,
    fill_zero,
    lead_of,
    log2,
    no_lower,
    rest_columns,
    rest_size,
    row_of,
    row_sums,
    scaled,
    tile_columns,
)

# Below the logarithm of the smallest mixture that is not 0; 0 times it stays 0.
LOWEST_LOG = tl.constexpr(-150.0)


@triton.jit
def _log_prob(x, scale, anchor, log_total):
    """Log-probs of a tile of logits. The subtractions stay apart: a rounded sum of anchor and
    log_total would be off as much as logits are far from 0."""
    return scaled(x, scale, anchor) - log_total


@triton.jit
def _log_ratio(p, log_p, log_other):
    """p * log(p / other), 0 where p is 0 (also where both logarithms are -inf)."""
    return tl.where(p == 0.0, 0.0, p * (log_p - log_other))


@triton.jit
def _mixture(log_q, log_t, BETA: tl.constexpr):
    """q, t, and both logarithms' differences from that of the mixture, for a beta between 0
    and 1."""
    log_q, log_t = no_lower(log_q, LOWEST), no_lower(log_t, LOWEST)
    q, t = exp2(log_q), exp2(log_t)
    log_m = no_lower(log2(BETA * t + (1.0 - BETA) * q), LOWEST_LOG)
    return q, t, log_q - log_m, log_t - log_m


@triton.jit
def _divergence_tile(log_q, log_t, BETA: tl.constexpr):
    """Each column's part of KL(teacher || mixture) and of KL(student || mixture); at the ends of
    beta the mixture is the other side, and only one of the two is wanted."""
    if BETA == 0.0:
        from_teacher = _log_ratio(exp2(log_t), log_t, log_q)
        return from_teacher, from_teacher
    elif BETA == 1.0:
        from_student = _log_ratio(exp2(log_q), log_q, log_t)
        return from_student, from_student
    else:
        q, t, student_gap, teacher_gap = _mixture(log_q, log_t, BETA)
        return t * teacher_gap, q * student_gap


@triton.jit
def _gradient_tile(log_q, log_t, student_kl, factor, BETA: tl.constexpr):
    """factor * d divergence / d logit; `student_kl` and the logarithms in base 2, as `factor`
    knows."""
    if BETA == 0.0:
        return factor * (exp2(log_q) - exp2(log_t))
    elif BETA == 1.0:
        q = exp2(log_q)
        return factor * (_log_ratio(q, log_q, log_t) - q * student_kl)
    else:
        q, _, student_gap, _ = _mixture(log_q, log_t, BETA)
        return (factor * q) * (student_gap - student_kl)


@triton.jit
def _sum_divergences(
    student_row, teacher_row, vocabulary, shared, scale,
    student_anchor, student_log, teacher_anchor, teacher_log,
    BETA: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """KL(teacher || mixture) and KL(student || mixture) of one row, in base 2."""
    TILE: tl.constexpr = VECTORS * THREADS * WIDTH
    columns = tile_columns(VECTORS, THREADS, WIDTH)
    from_teacher = tl.zeros((THREADS,), tl.float32)
    from_student = tl.zeros((THREADS,), tl.float32)
    lead = lead_of(student_row, vocabulary, ROWS)
    student_body = body_of(student_row, lead, ROWS)
    teacher_body = body_of(teacher_row, lead, ROWS)
    full = (shared - lead) // TILE * TILE
    if full > 0:
        student_tile = tl.load(student_body + columns)
        teacher_tile = tl.load(teacher_body + columns)
        for start in range(0, full, TILE):
            following = tl.minimum(start + TILE, full - TILE) + columns
            student_ahead = tl.load(student_body + following)
            teacher_ahead = tl.load(teacher_body + following)
            log_q = _log_prob(student_tile.to(tl.float32), scale, student_anchor, student_log)
            log_t = _log_prob(teacher_tile.to(tl.float32), scale, teacher_anchor, teacher_log)
            of_teacher, of_student = _divergence_tile(log_q, log_t, BETA)
            if BETA < 1.0:
                from_teacher += tl.sum(tl.sum(of_teacher, axis=0), axis=1)
            if BETA > 0.0:
                from_student += tl.sum(tl.sum(of_student, axis=0), axis=1)
            student_tile, teacher_tile = student_ahead, teacher_ahead
    for start in range(full, vocabulary, rest_size(VECTORS, THREADS, WIDTH)):
        log_q, log_t, _, _ = _rest_log_probs(
            student_row, teacher_row, start, lead, vocabulary, shared, scale,
            student_anchor, student_log, teacher_anchor, teacher_log,
            ROWS, VECTORS, THREADS, WIDTH,
        )  # fmt: skip
        of_teacher, of_student = _divergence_tile(log_q, log_t, BETA)
        if BETA < 1.0:
            from_teacher += tl.sum(tl.sum(of_teacher, axis=0), axis=1)
        if BETA > 0.0:
            from_student += tl.sum(tl.sum(of_student, axis=0), axis=1)
    return tl.sum(from_teacher, axis=0), tl.sum(from_student, axis=0)


@triton.jit
def _rest_log_probs(
    student_row, teacher_row, start, lead, vocabulary, shared, scale,
    student_anchor, student_log, teacher_anchor, teacher_log,
    ROWS: tl.constexpr, VECTORS: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Log-probs of a tile behind the full ones, -inf outside of the vocabulary and where the
    teacher has no such token; its columns, and which of them exist."""
    column, inside = rest_columns(start, lead, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
    known = inside & (column < shared)
    student_tile = tl.load(student_row + column, mask=inside, other=0.0)
    teacher_tile = tl.load(teacher_row + column, mask=known, other=0.0)
    log_q = _log_prob(student_tile.to(tl.float32), scale, student_anchor, student_log)
    log_t = _log_prob(teacher_tile.to(tl.float32), scale, teacher_anchor, teacher_log)
    log_q = tl.where(inside, log_q, float("-inf"))
    return log_q, tl.where(known, log_t, float("-inf")), column, inside


@triton.jit
def _write_gradient(
    student_row, teacher_row, gradient_row, vocabulary, shared, scale,
    student_anchor, student_log, teacher_anchor, teacher_log, student_kl, factor,
    BETA: tl.constexpr, SHARES_STORAGE: tl.constexpr, ROWS: tl.constexpr,
    VECTORS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sweep 3; barriers as in `triton_sweeps.write_gradient`."""
    TILE: tl.constexpr = VECTORS * THREADS * WIDTH
    columns = tile_columns(VECTORS, THREADS, WIDTH)
    lead = lead_of(student_row, vocabulary, ROWS)
    student_body = body_of(student_row, lead, ROWS)
    teacher_body = body_of(teacher_row, lead, ROWS)
    gradient_body = body_of(gradient_row, lead, ROWS)
    full = (shared - lead) // TILE * TILE
    tl.debug_barrier()
    if full > 0:
        student_tile = tl.load(student_body + columns)
        teacher_tile = tl.load(teacher_body + columns)
        begin = 0
        while begin < full:
            end = full
            if SHARES_STORAGE:
                tl.debug_barrier()
                end = tl.minimum(full, 2 * begin + 2 * TILE)
            for start in range(begin, end, TILE):
                following = tl.minimum(start + TILE, full - TILE) + columns
                student_ahead = tl.load(student_body + following)
                teacher_ahead = tl.load(teacher_body + following)
                log_q = _log_prob(student_tile.to(tl.float32), scale, student_anchor, student_log)
                log_t = _log_prob(teacher_tile.to(tl.float32), scale, teacher_anchor, teacher_log)
                values = _gradient_tile(log_q, log_t, student_kl, factor, BETA)
                tl.store(gradient_body + start + columns, values.to(gradient_row.dtype.element_ty))
                student_tile, teacher_tile = student_ahead, teacher_ahead
            begin = end
    for start in range(full, vocabulary, rest_size(VECTORS, THREADS, WIDTH)):
        log_q, log_t, column, inside = _rest_log_probs(
            student_row, teacher_row, start, lead, vocabulary, shared, scale,
            student_anchor, student_log, teacher_anchor, teacher_log,
            ROWS, VECTORS, THREADS, WIDTH,
        )  # fmt: skip
        values = _gradient_tile(log_q, log_t, student_kl, factor, BETA)
        if SHARES_STORAGE:
            tl.debug_barrier()
        tl.store(gradient_row + column, values.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "student_stride", "teacher_stride", "gradient_stride"])
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
    inverse_temperature,
    BETA: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`scale` points to one float32; `shared` columns exist in both vocabularies, the teacher is 0
    in the student's others.
    """
    index = tl.program_id(0).to(tl.int64)
    base_2 = exponent_scale(1.0, inverse_temperature, 0.0)
    while index < rows:
        student_row = row_of(student, index, student_stride, ROWS)
        teacher_row = row_of(teacher, index, teacher_stride, ROWS)
        gradient_row = row_of(gradient, index, gradient_stride, ROWS)
        if tl.load(mask + index) == 0:
            tl.store(divergences + index, 0.0)
            tl.store(entropies + index, 0.0)
            if HAS_GRADIENT:
                fill_zero(gradient_row, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
        else:
            student_anchor, student_sum, weighted = row_sums(
                student_row, vocabulary, 1.0, base_2, 0.0, True, ROWS, VECTORS,
                THREADS, WIDTH,
            )  # fmt: skip
            teacher_anchor, teacher_sum, _ = row_sums(
                teacher_row, shared, 1.0, base_2, 0.0, False, ROWS, VECTORS, THREADS,
                WIDTH,
            )  # fmt: skip
            student_log, teacher_log = tl.log2(student_sum), tl.log2(teacher_sum)
            teacher_kl, student_kl = _sum_divergences(
                student_row, teacher_row, vocabulary, shared, base_2,
                student_anchor, student_log, teacher_anchor, teacher_log,
                BETA, ROWS, VECTORS, THREADS, WIDTH,
            )  # fmt: skip
            divergence = BETA * teacher_kl + (1.0 - BETA) * student_kl
            if BETA == 0.0:
                divergence = teacher_kl
            elif BETA == 1.0:
                divergence = student_kl
            tl.store(divergences + index, divergence * LN_2)
            tl.store(entropies + index, (student_log - weighted / student_sum) * LN_2)
            if HAS_GRADIENT:
                factor = tl.load(scale) * inverse_temperature
                if BETA > 0.0:
                    factor *= LN_2
                if BETA > 0.0 and BETA < 1.0:
                    factor *= 1.0 - BETA
                _write_gradient(
                    student_row, teacher_row, gradient_row, vocabulary, shared, base_2,
                    student_anchor, student_log, teacher_anchor, teacher_log, student_kl, factor,
                    BETA, SHARES_STORAGE, ROWS, VECTORS, THREADS, WIDTH,
                )  # fmt: skip
        index += tl.num_programs(0)
