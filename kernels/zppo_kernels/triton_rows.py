"""Triton kernels over rows of logits: statistics, the fused policy row, and the gradient of a known
coefficient.

Invariants: offsets of a row are int64; the main loop over the vocabulary loads 16 bytes a thread,
and only the tail is masked column by column; a padded column is -inf and never counts; every
constant is a `tl.constexpr`, none is a float argument.

Shapes: rows of V logits, `stride` elements apart; everything per row or per sequence is contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_policy import policy_terms


@triton.jit
def _add_tile(logits, highest, total, weighted, INVERSE_TEMPERATURE: tl.constexpr):
    """Online softmax sums of one more tile; a row that is -inf so far stays at 0 instead of
    becoming NaN."""
    raised = tl.maximum(highest, tl.max(logits, axis=0))
    anchor = tl.where(raised == float("-inf"), 0.0, raised)
    shift = (highest - anchor) * INVERSE_TEMPERATURE
    keep = tl.exp(shift)
    moved = tl.where(keep == 0.0, 0.0, keep * shift)
    x = (logits - anchor) * INVERSE_TEMPERATURE
    p = tl.exp(x)
    weighted = weighted * keep + total * moved + tl.where(p == 0.0, 0.0, p * x)
    total = total * keep + p
    return raised, total, weighted


@triton.jit
def load_first(row, vocabulary, BLOCK: tl.constexpr):
    """The first full tile, or -inf where the vocabulary is smaller than a tile."""
    columns = tl.arange(0, BLOCK)
    return tl.load(row + columns, mask=columns < vocabulary // BLOCK * BLOCK, other=float("-inf"))


@triton.jit
def load_tail(row, vocabulary, BLOCK: tl.constexpr):
    """What is left behind the full tiles, -inf beyond the vocabulary."""
    columns = vocabulary // BLOCK * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row + columns, mask=columns < vocabulary, other=float("-inf"))


@triton.jit
def row_sums(row, vocabulary, INVERSE_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr):
    """Highest logit, sum of exp(x) and of exp(x) * x, with x = (logit - highest) / temperature.

    Each tile is loaded while the one before it is summed: the maximum is a barrier, and a lone tile
    would wait for memory there.
    """
    columns = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    full = vocabulary // BLOCK * BLOCK
    tile = load_first(row, vocabulary, BLOCK)
    for start in range(BLOCK, full, BLOCK):
        ahead = tl.load(row + start + columns)
        highest, total, weighted = _add_tile(
            tile.to(tl.float32), highest, total, weighted, INVERSE_TEMPERATURE
        )
        tile = ahead
    tail = load_tail(row, vocabulary, BLOCK)
    highest, total, weighted = _add_tile(
        tile.to(tl.float32), highest, total, weighted, INVERSE_TEMPERATURE
    )
    highest, total, weighted = _add_tile(
        tail.to(tl.float32), highest, total, weighted, INVERSE_TEMPERATURE
    )
    return highest, tl.sum(total, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def target_logit(row, target, vocabulary):
    """The logit of the target; NaN for an id out of the vocabulary, so that the loss says so."""
    inside = (target >= 0) & (target < vocabulary)
    return tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def fill_zero(row, vocabulary, BLOCK: tl.constexpr):
    """Zeros over one row. Where it is the memory of logits whose values are still needed, a barrier
    comes before."""
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32).to(row.dtype.element_ty)
    full = vocabulary // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        tl.store(row + start + columns, zeros)
    if full < vocabulary:
        tl.store(row + full + columns, zeros, mask=full + columns < vocabulary)


@triton.jit
def _softmax_tile(
    logits, columns, anchor, factor, target, label, INVERSE_TEMPERATURE: tl.constexpr
):
    """factor * exp(x), and at the target the label's entry, formed in float32 before any
    rounding."""
    values = factor * tl.exp((logits.to(tl.float32) - anchor) * INVERSE_TEMPERATURE)
    return tl.where(columns == target, label, values)


@triton.jit
def write_softmax(
    source,
    destination,
    vocabulary,
    anchor,
    factor,
    target,
    label,
    INVERSE_TEMPERATURE: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """destination = factor * exp((source - anchor) / temperature), label at the target.

    The first barrier lets every thread read the target's logit before one overwrites it, where both
    are the same memory. With SHARES_STORAGE a narrower destination row begins where the source row
    does: tile k is written at or before what tile k reads, so all threads must have read their part
    of a tile before one writes.
    """
    columns = tl.arange(0, BLOCK)
    full = vocabulary // BLOCK * BLOCK
    tl.debug_barrier()
    tile = load_first(source, vocabulary, BLOCK)
    for start in range(0, full, BLOCK):
        following = start + BLOCK + columns
        ahead = tl.load(source + following, mask=following < full, other=float("-inf"))
        values = _softmax_tile(
            tile, start + columns, anchor, factor, target, label, INVERSE_TEMPERATURE
        )
        if SHARES_STORAGE:
            tl.debug_barrier()
        tl.store(destination + start + columns, values.to(destination.dtype.element_ty))
        tile = ahead
    tail = load_tail(source, vocabulary, BLOCK)
    values = _softmax_tile(tail, full + columns, anchor, factor, target, label, INVERSE_TEMPERATURE)
    if SHARES_STORAGE:
        tl.debug_barrier()
    tl.store(
        destination + full + columns,
        values.to(destination.dtype.element_ty),
        mask=full + columns < vocabulary,
    )


@triton.jit
def statistics_kernel(
    logits,
    target_ids,
    log_probs,
    entropies,
    lse,
    vocabulary,
    stride,
    INVERSE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: log-prob of the target, entropy, log-sum-exp of the scaled logits."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    highest, total, weighted = row_sums(row, vocabulary, INVERSE_TEMPERATURE, BLOCK)
    log_total = tl.log(total)
    picked = target_logit(row, tl.load(target_ids + index), vocabulary)
    tl.store(log_probs + index, (picked - highest) * INVERSE_TEMPERATURE - log_total)
    tl.store(entropies + index, log_total - weighted / total)
    empty = highest == float("-inf")
    tl.store(lse + index, tl.where(empty, highest, highest * INVERSE_TEMPERATURE + log_total))


@triton.jit
def gradient_kernel(
    logits,
    gradient,
    lse,
    probability,
    target_ids,
    label,
    vocabulary,
    logits_stride,
    gradient_stride,
    TEMPERATURE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: gradient = probability * softmax + label * onehot(target)."""
    index = tl.program_id(0).to(tl.int64)
    source, destination = logits + index * logits_stride, gradient + index * gradient_stride
    factor, target, extra = (
        tl.load(probability + index),
        tl.load(target_ids + index),
        tl.load(label + index),
    )
    row_lse = tl.load(lse + index)
    at_target = factor * tl.exp(
        target_logit(source, target, vocabulary) * INVERSE_TEMPERATURE - row_lse
    )
    entry = tl.where(factor == 0.0, 0.0, at_target) + extra
    if factor == 0.0:
        # No barrier: nothing read from this row enters `entry` here. It would cost 25 registers a
        # thread.
        fill_zero(destination, vocabulary, BLOCK)
        tl.debug_barrier()
        inside = (target >= 0) & (target < vocabulary)
        tl.store(
            destination + target, entry.to(gradient.dtype.element_ty), mask=inside & (extra != 0.0)
        )
    else:
        write_softmax(
            source,
            destination,
            vocabulary,
            row_lse * TEMPERATURE,
            factor,
            target,
            entry,
            INVERSE_TEMPERATURE,
            SHARES_STORAGE,
            BLOCK,
        )


@triton.jit
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
    INVERSE_TEMPERATURE: tl.constexpr,
    SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    HAS_PROXIMAL: tl.constexpr,
    WEIGHTS_ARE_LATE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The fused row, for a fixed number of programs that share the rows out: softmax, ratio, clips,
    loss, metrics, gradient.

    Few enough programs keep their rows in the L2 cache, so that the second sweep does not go to
    device memory. Each row writes one line of `row_metrics` (zeros before): no atomics, so the sums
    are the same in every run.
    """
    index = tl.program_id(0).to(tl.int64)
    while index < rows:
        source, destination = logits + index * logits_stride, gradient + index * gradient_stride
        coefficient = 0.0
        highest, total, label = 0.0, 1.0, 0.0
        target = tl.load(target_ids + index)
        if tl.load(mask + index) != 0:
            highest, total, weighted = row_sums(source, vocabulary, INVERSE_TEMPERATURE, BLOCK)
            log_total = tl.log(total)
            log_prob = (
                target_logit(source, target, vocabulary) - highest
            ) * INVERSE_TEMPERATURE - log_total
            entropy = log_total - weighted / total
            by_log_prob, _ = policy_terms(
                index, log_prob, entropy, advantages, scales, weights, proximal, behaviour,
                reference, log_probs, entropies, row_metrics, clip_low, clip_high, dual_clip,
                sapo_positive, sapo_negative, floor, cap, kl_coefficient, entropy_coefficient,
                SURROGATE, CORRECTION, KL_ESTIMATOR, KL_CORRECTION, HAS_PROXIMAL, WEIGHTS_ARE_LATE,
                HAS_REFERENCE, HAS_ENTROPY,
            )  # fmt: skip
            coefficient = by_log_prob * INVERSE_TEMPERATURE
            label = coefficient * (1.0 - tl.exp(log_prob))
        if HAS_GRADIENT:
            if coefficient == 0.0:
                # Every thread has its coefficient from the target's logit; none may read it as 0
                # and go the other way.
                tl.debug_barrier()
                fill_zero(destination, vocabulary, BLOCK)
            else:
                factor = -coefficient / total
                write_softmax(
                    source, destination, vocabulary, highest, factor, target, label,
                    INVERSE_TEMPERATURE, SHARES_STORAGE, BLOCK,
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
