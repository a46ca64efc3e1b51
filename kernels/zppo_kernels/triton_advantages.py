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
def _scaled_by(rewards, centred, trivial, valid, index, inside, MODE: tl.constexpr):
    """What the scale of a mode beyond one group is taken over, and which rollouts it counts: all
    rewards themselves, or A' of all groups or of those that are not trivial."""
    if MODE == "batch":
        return tl.load(rewards + index, mask=inside, other=0.0).to(tl.float64), valid
    elif MODE == "norm_with_zero":
        return centred, valid
    else:
        return centred, valid & ~trivial


@triton.jit
def _squares(rewards, group_ids, sums, bounds, rows, mean, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the squared deviations from `mean` of what the scale is taken over."""
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < rows
        centred, trivial, _, valid = _centred(rewards, group_ids, sums, bounds, rows, index, inside)
        value, kept = _scaled_by(rewards, centred, trivial, valid, index, inside, MODE)
        squares += tl.where(kept, (value - mean) * (value - mean), 0.0)
    return tl.sum(squares, axis=0)


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
    MODE: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """MODE: an `advantages.AdvantageMode`. `given` points to what A' of the modes beyond one group
    is shifted and scaled by, if a wider scope is to decide it. A group id outside [0, rows) makes
    its advantage NaN, and so does a NaN reward for its whole group (and for everything, where a
    mean over groups is taken)."""
    SCALED_BY_GROUP: tl.constexpr = MODE == "grpo" or MODE == "grpo_bessel"
    WITHIN_GROUP: tl.constexpr = SCALED_BY_GROUP or MODE == "center_only" or MODE == "rloo"
    # Divided by the number of rollouts, or by one less: the sample's standard deviation.
    LESS: tl.constexpr = 1.0 if MODE == "grpo_bessel" or MODE == "batch" else 0.0
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
        if SCALED_BY_GROUP:
            tl.atomic_add(sums + 2 * rows + group, centred * centred, mask=valid, sem="relaxed")
        value, kept = _scaled_by(rewards, centred, trivial, valid, index, inside, MODE)
        kept_sum += tl.where(kept, value, 0.0)
        kept_count += kept.to(tl.float64)
    tl.debug_barrier()
    mean, std = 0.0, 1.0
    if IS_GIVEN:
        mean, std = tl.load(given), tl.load(given + 1)
    elif not WITHIN_GROUP:
        count = tl.maximum(tl.sum(kept_count, axis=0), 1.0)
        mean = tl.sum(kept_sum, axis=0) / count
        squares = _squares(rewards, group_ids, sums, bounds, rows, mean, MODE, BLOCK)
        std = tl.sqrt(squares / tl.maximum(count - LESS, 1.0))
        if MODE == "batch":
            mean = 0.0
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        centred, trivial, group, valid = _centred(
            rewards, group_ids, sums, bounds, rows, index, inside
        )
        result = centred
        if SCALED_BY_GROUP:
            count = tl.maximum(tl.load(sums + group, mask=valid, other=1.0) - LESS, 1.0)
            squared = tl.load(sums + 2 * rows + group, mask=valid, other=0.0)
            result = centred / (tl.sqrt(squared / count) + EPS)
        elif MODE == "rloo":
            count = tl.load(sums + group, mask=valid, other=1.0)
            result = centred * count / tl.maximum(count - 1.0, 1.0)
        elif not WITHIN_GROUP:
            result = (centred - mean) / (std + EPS)
        result = tl.where(trivial, 0.0, result)
        tl.store(
            advantages + index, tl.where(valid, result, float("nan")).to(tl.float32), mask=inside
        )
