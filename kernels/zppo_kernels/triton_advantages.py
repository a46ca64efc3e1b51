"""Triton kernel for group advantages: one launch, one program, any group order and size.

Group sums go through a scratch area of one line per possible group id, with atomics and a barrier
of the one program between the passes. Rewards of 0 and 1 sum exactly; others may differ in the last
place from run to run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

SCRATCH_LINES = 5  # count, sum, sum of squared deviations, lowest, highest


@triton.jit
def _centred(rewards, group_ids, scratch, rows, index, inside):
    """A' of these rollouts (exactly 0 in trivial groups), whether the group is trivial, group ids,
    and which ids are valid.
    """
    group = tl.load(group_ids + index, mask=inside, other=0)
    valid = inside & (group >= 0) & (group < rows)
    count = tl.load(scratch + group, mask=valid, other=1.0)
    mean = tl.load(scratch + rows + group, mask=valid, other=0.0) / count
    low = tl.load(scratch + 3 * rows + group, mask=valid, other=0.0)
    high = tl.load(scratch + 4 * rows + group, mask=valid, other=0.0)
    trivial = (low == high) & (mean == mean)
    reward = tl.load(rewards + index, mask=inside, other=0.0)
    return tl.where(trivial, 0.0, reward - mean), trivial, group, valid


@triton.jit
def advantages_kernel(
    rewards,
    group_ids,
    advantages,
    scratch,
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
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(scratch + index, zero, mask=inside)
        tl.store(scratch + rows + index, zero, mask=inside)
        tl.store(scratch + 2 * rows + index, zero, mask=inside)
        tl.store(scratch + 3 * rows + index, zero + float("inf"), mask=inside)
        tl.store(scratch + 4 * rows + index, zero - float("inf"), mask=inside)
    tl.debug_barrier()
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        group = tl.load(group_ids + index, mask=inside, other=0)
        valid = inside & (group >= 0) & (group < rows)
        reward = tl.load(rewards + index, mask=inside, other=0.0)
        tl.atomic_add(scratch + group, 1.0, mask=valid, sem="relaxed")
        tl.atomic_add(scratch + rows + group, reward, mask=valid, sem="relaxed")
        tl.atomic_min(scratch + 3 * rows + group, reward, mask=valid, sem="relaxed")
        tl.atomic_max(scratch + 4 * rows + group, reward, mask=valid, sem="relaxed")
    tl.debug_barrier()
    kept_sum = tl.zeros((BLOCK,), tl.float32)
    kept_count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        centred, trivial, group, valid = _centred(rewards, group_ids, scratch, rows, index, inside)
        if IS_GRPO:
            tl.atomic_add(scratch + 2 * rows + group, centred * centred, mask=valid, sem="relaxed")
        kept = valid & (COUNTS_TRIVIAL | ~trivial)
        kept_sum += tl.where(kept, centred, 0.0)
        kept_count += kept.to(tl.float32)
    tl.debug_barrier()
    mean, std = 0.0, 1.0
    if IS_GIVEN:
        mean, std = tl.load(given), tl.load(given + 1)
    elif not IS_GRPO and not IS_CENTER_ONLY:
        count = tl.maximum(tl.sum(kept_count, axis=0), 1.0)
        mean = tl.sum(kept_sum, axis=0) / count
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, rows, BLOCK):
            index = start + lane
            inside = index < rows
            centred, trivial, _, valid = _centred(rewards, group_ids, scratch, rows, index, inside)
            kept = valid & (COUNTS_TRIVIAL | ~trivial)
            squares += tl.where(kept, (centred - mean) * (centred - mean), 0.0)
        std = tl.sqrt(tl.sum(squares, axis=0) / count)
    for start in range(0, rows, BLOCK):
        index = start + lane
        inside = index < rows
        centred, trivial, group, valid = _centred(rewards, group_ids, scratch, rows, index, inside)
        result = centred
        if IS_GRPO:
            count = tl.load(scratch + group, mask=valid, other=1.0)
            squared = tl.load(scratch + 2 * rows + group, mask=valid, other=0.0)
            result = centred / (tl.sqrt(squared / count) + EPS)
        elif not IS_CENTER_ONLY:
            result = (centred - mean) / (std + EPS)
        result = tl.where(trivial, 0.0, result)
        tl.store(advantages + index, tl.where(valid, result, float("nan")), mask=inside)
