"""Triton kernel for group advantages: one launch, one program, any group order and size.

Group sums go through scratch areas of one line per possible group id, with atomics and a barrier of
the one program between the passes. They are float64: of rewards near 100 that differ by 1e-3,
float32 would leave two digits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

SUM_LINES = 3  # float64: count, sum, sum of squared deviations
BOUND_LINES = 2  # float32, as the rewards: lowest, highest


@triton.jit
def _centred(rewards, group_ids, sums, bounds, rows, index, inside):
    """A' of these rollouts (exactly 0 in trivial groups), whether the group is trivial, group ids,
    and which ids are valid.
    """
    group = tl.load(group_ids + index, mask=inside, other=0)
    valid = inside & (group >= 0) & (group < rows)
    count = tl.load(sums + group, mask=valid, other=1.0)
    mean = tl.load(sums + rows + group, mask=valid, other=0.0) / count
    low = tl.load(bounds + group, mask=valid, other=0.0)
    high = tl.load(bounds + rows + group, mask=valid, other=0.0)
    trivial = (low == high) & (mean == mean)
    reward = tl.load(rewards + index, mask=inside, other=0.0).to(tl.float64)
    return tl.where(trivial, 0.0, reward - mean), trivial, group, valid


@triton.jit
def advantages_kernel(
    rewards,
    group_ids,
    advantages,
    sums,
    bounds,
    given,
    rows,
    EPS: tl.constexpr,
    IS_GRPO: tl.constexpr,
    IS_CENTER_ONLY: tl.constexpr,
    COUNTS_TRIVIAL: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`given` points to mean and std of a wider scope. A group id outside [0, rows) makes its
    advantage NaN, and so does a NaN reward for its whole group (and for everything, where a mean
    over groups is taken)."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        zero = tl.zeros((BLOCK,), tl.float64)
        highest = tl.full((BLOCK,), float("inf"), tl.float32)
        tl.store(sums + index, zero, mask=inside)
        tl.store(sums + rows + index, zero, mask=inside)
        tl.store(sums + 2 * rows + index, zero, mask=inside)
        tl.store(bounds + index, highest, mask=inside)
        tl.store(bounds + rows + index, -highest, mask=inside)
    tl.debug_barrier()
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        group = tl.load(group_ids + index, mask=inside, other=0)
        valid = inside & (group >= 0) & (group < rows)
        reward = tl.load(rewards + index, mask=inside, other=0.0)
        tl.atomic_add(sums + group, tl.full((BLOCK,), 1.0, tl.float64), mask=valid, sem="relaxed")
        tl.atomic_add(sums + rows + group, reward.to(tl.float64), mask=valid, sem="relaxed")
        tl.atomic_min(bounds + group, reward, mask=valid, sem="relaxed")
        tl.atomic_max(bounds + rows + group, reward, mask=valid, sem="relaxed")
    tl.debug_barrier()
    kept_sum = tl.zeros((BLOCK,), tl.float64)
    kept_count = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        centred, trivial, group, valid = _centred(
            rewards, group_ids, sums, bounds, rows, index, inside
        )
        if IS_GRPO:
            tl.atomic_add(sums + 2 * rows + group, centred * centred, mask=valid, sem="relaxed")
        kept = valid & (COUNTS_TRIVIAL | ~trivial)
        kept_sum += tl.where(kept, centred, 0.0)
        kept_count += kept.to(tl.float64)
    tl.debug_barrier()
    mean, std = 0.0, 1.0
    if IS_GIVEN:
        mean, std = tl.load(given), tl.load(given + 1)
    elif not IS_GRPO and not IS_CENTER_ONLY:
        count = tl.maximum(tl.sum(kept_count, axis=0), 1.0)
        mean = tl.sum(kept_sum, axis=0) / count
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, rows, BLOCK):
            index = start + lane
            inside = index < rows
            centred, trivial, _, valid = _centred(
                rewards, group_ids, sums, bounds, rows, index, inside
            )
            kept = valid & (COUNTS_TRIVIAL | ~trivial)
            squares += tl.where(kept, (centred - mean) * (centred - mean), 0.0)
        std = tl.sqrt(tl.sum(squares, axis=0) / count)
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        centred, trivial, group, valid = _centred(
            rewards, group_ids, sums, bounds, rows, index, inside
        )
        result = centred
        if IS_GRPO:
            count = tl.load(sums + group, mask=valid, other=1.0)
            squared = tl.load(sums + 2 * rows + group, mask=valid, other=0.0)
            result = centred / (tl.sqrt(squared / count) + EPS)
        elif not IS_CENTER_ONLY:
            result = (centred - mean) / (std + EPS)
        result = tl.where(trivial, 0.0, result)
        tl.store(
            advantages + index, tl.where(valid, result, float("nan")).to(tl.float32), mask=inside
        )
