"""Triton kernels over rows of logits: statistics, the fused policy row, and the gradient of a known
coefficient.

Invariants: offsets of a row are int64; the main loop over the vocabulary loads 16 bytes a thread,
and only what is left behind it is masked column by column; temperature and logit scale are
arguments, so that changing them compiles nothing anew.

Shapes: rows of V logits, `stride` elements apart; everything per row or per sequence is contiguous.
ROWS, VECTORS, THREADS, WIDTH: `triton_sweeps`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_policy import policy_terms
from .triton_sweeps import (
    LN_2,
    LOG2_E,
    cap_slope,
    capped,
    exp2,
    exponent_scale,
    fill_zero,
    row_of,
    row_sums,
    target_exponent,
    write_gradient,
)


@triton.jit
def _target_slope(row, target, vocabulary, logit_scale, SOFT_CAP: tl.constexpr):
    """`cap_slope` of the target's logit."""
    if SOFT_CAP > 0.0:
        inside = (target >= 0) & (target < vocabulary)
        raw = tl.load(row + target, mask=inside, other=0.0)
        return cap_slope(capped(raw, logit_scale, SOFT_CAP), SOFT_CAP)
    else:
        return 1.0


@triton.jit(do_not_specialize=["stride"])
def statistics_kernel(
    logits,
    target_ids,
    log_probs,
    entropies,
    lse,
    vocabulary,
    stride,
    logit_scale,
    inverse_temperature,
    SOFT_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row: log-prob of the target, entropy, log-sum-exp of the scaled logits."""
    index = tl.program_id(0).to(tl.int64)
    row = row_of(logits, index, stride, ROWS)
    scale = exponent_scale(logit_scale, inverse_temperature, SOFT_CAP)
    anchor, total, weighted = row_sums(
        row, vocabulary, logit_scale, scale, SOFT_CAP, True, ROWS, VECTORS, THREADS, WIDTH
    )
    log_total = tl.log(total)
    picked = target_exponent(
        row, tl.load(target_ids + index), vocabulary, logit_scale, scale, anchor, SOFT_CAP
    )
    tl.store(log_probs + index, picked * LN_2 - log_total)
    tl.store(entropies + index, log_total - (weighted / total) * LN_2)
    tl.store(lse + index, anchor * LN_2 + log_total)


@triton.jit(do_not_specialize=["logits_stride", "gradient_stride"])
def gradient_kernel(
    logits,
    gradient,
    lse,
    probability,
    log_probability,
    target_ids,
    label,
    vocabulary,
    logits_stride,
    gradient_stride,
    logit_scale,
    inverse_temperature,
    HAS_ENTROPY: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row: gradient = softmax * (probability + log_probability * log softmax) + label
    * onehot(target); `log_probability` exists only with HAS_ENTROPY."""
    index = tl.program_id(0).to(tl.int64)
    source = row_of(logits, index, logits_stride, ROWS)
    destination = row_of(gradient, index, gradient_stride, ROWS)
    factor, by_log = tl.load(probability + index), 0.0
    if HAS_ENTROPY:
        by_log = tl.load(log_probability + index) * LN_2
    target, extra = tl.load(target_ids + index), tl.load(label + index)
    scale = exponent_scale(logit_scale, inverse_temperature, SOFT_CAP)
    anchor = tl.load(lse + index) * LOG2_E
    slope = _target_slope(source, target, vocabulary, logit_scale, SOFT_CAP)
    is_zero = factor == 0.0
    if HAS_ENTROPY:
        is_zero = is_zero & (by_log == 0.0)
    if is_zero:
        # Nothing read from this row but the slope of the soft cap enters the entry here.
        if SOFT_CAP > 0.0:
            tl.debug_barrier()
        fill_zero(destination, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
        tl.debug_barrier()
        inside = (target >= 0) & (target < vocabulary)
        lone = (slope * extra).to(gradient.dtype.element_ty)
        tl.store(destination + target, lone, mask=inside & (extra != 0.0))
    else:
        y = target_exponent(source, target, vocabulary, logit_scale, scale, anchor, SOFT_CAP)
        p = exp2(y)
        entry = factor * p + extra
        if HAS_ENTROPY:
            entry += tl.where(p == 0.0, 0.0, p * by_log * y)
        write_gradient(
            source, destination, vocabulary, logit_scale, scale, anchor, factor, by_log, target,
            slope * entry, SOFT_CAP, HAS_ENTROPY, SHARES_STORAGE, ROWS, VECTORS, THREADS, WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "logits_stride", "gradient_stride"])
def policy_kernel(
    logits,
    gradient,
    mask,
    target_ids,
    advantages,
    scales,
    weights,
    proximal,
    behaviour,
    reference,
    log_probs,
    entropies,
    row_metrics,
    clip_low,
    clip_high,
    dual_clip,
    sapo_positive,
    sapo_negative,
    floor,
    cap,
    kl_coefficient,
    entropy_coefficient,
    rows,
    vocabulary,
    logits_stride,
    gradient_stride,
    logit_scale,
    inverse_temperature,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    HAS_PROXIMAL: tl.constexpr,
    WEIGHTS_ARE_LATE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The fused row, for a fixed number of programs that share the rows out: softmax, ratio, clips,
    loss, metrics, gradient.

    HAS_ENTROPY: the loss depends on the row's entropy H as well, and the gradient has a term
    -p (log p + H). Each row writes one line of `row_metrics` (zeros before): no atomics, so the
    sums are the same in every run.
    """
    index = tl.program_id(0).to(tl.int64)
    scale = exponent_scale(logit_scale, inverse_temperature, SOFT_CAP)
    by_raw = logit_scale * inverse_temperature
    while index < rows:
        source = row_of(logits, index, logits_stride, ROWS)
        destination = row_of(gradient, index, gradient_stride, ROWS)
        coefficient, by_entropy = 0.0, 0.0
        anchor, total, mean, label = 0.0, 1.0, 0.0, 0.0
        target = tl.load(target_ids + index)
        if tl.load(mask + index) != 0:
            anchor, total, weighted = row_sums(
                source, vocabulary, logit_scale, scale, SOFT_CAP, True, ROWS, VECTORS, THREADS,
                WIDTH,
            )  # fmt: skip
            log_total, mean = tl.log(total), weighted / total
            picked = target_exponent(
                source, target, vocabulary, logit_scale, scale, anchor, SOFT_CAP
            )
            log_prob = picked * LN_2 - log_total
            by_log_prob, by_entropy = policy_terms(
                index, log_prob, log_total - mean * LN_2, advantages, scales, weights, proximal,
                behaviour, reference, log_probs, entropies, row_metrics, clip_low, clip_high,
                dual_clip, sapo_positive, sapo_negative, floor, cap, kl_coefficient,
                entropy_coefficient, SURROGATE, CORRECTION, KL_ESTIMATOR, KL_CORRECTION,
                HAS_PROXIMAL, WEIGHTS_ARE_LATE, HAS_REFERENCE, HAS_ENTROPY,
            )  # fmt: skip
            coefficient, by_entropy = by_log_prob * by_raw, by_entropy * by_raw
            probability = tl.exp(log_prob)
            label = coefficient * (1.0 - probability)
            if HAS_ENTROPY:
                surprise = by_entropy * probability * LN_2 * (picked - mean)
                label -= tl.where(probability == 0.0, 0.0, surprise)
            label *= _target_slope(source, target, vocabulary, logit_scale, SOFT_CAP)
        if HAS_GRADIENT:
            is_zero = coefficient == 0.0
            if HAS_ENTROPY:
                is_zero = is_zero & (by_entropy == 0.0)
            if is_zero:
                # Every thread has its coefficient from the target's logit; none may read it as 0
                # and go the other way.
                tl.debug_barrier()
                fill_zero(destination, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
            else:
                factor = (by_entropy * mean * LN_2 - coefficient) / total
                write_gradient(
                    source, destination, vocabulary, logit_scale, scale, anchor, factor,
                    -by_entropy * LN_2 / total, target, label, SOFT_CAP, HAS_ENTROPY,
                    SHARES_STORAGE, ROWS, VECTORS, THREADS, WIDTH,
                )  # fmt: skip
        index += tl.num_programs(0)


@triton.jit
def scale_kernel(matrix, factor, columns_count, stride, BLOCK: tl.constexpr):
    """One program a row: row *= factor, and nothing at all where the factor, read on the device, is
    1."""
    value = tl.load(factor).to(tl.float32)
    if value == 1.0:
        return
    row = matrix + tl.program_id(0).to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    for start in range(0, columns_count, BLOCK):
        inside = start + columns < columns_count
        scaled = tl.load(row + start + columns, mask=inside).to(tl.float32) * value
        tl.store(row + start + columns, scaled.to(matrix.dtype.element_ty), mask=inside)
