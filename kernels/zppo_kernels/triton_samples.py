"""Triton kernel for what is known before the logits: importance weights and metrics.SAMPLE_METRICS,
one launch over all rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .metrics import SAMPLE_METRICS
from .triton_rows import BOUND

SAMPLE_PARTIALS = tl.constexpr(len(SAMPLE_METRICS))


@triton.jit
def samples_kernel(
    mask,
    sequence_ids,
    advantages,
    proximal,
    behaviour,
    weights,
    partials,
    rows,
    cap,
    CORRECTION: tl.constexpr,
    HAS_BEHAVIOUR: tl.constexpr,
    HAS_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CORRECTION: index into settings.CORRECTIONS. `cap` is a pointer to one float32."""
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    used = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
    advantage = tl.load(
        advantages + tl.load(sequence_ids + index, mask=inside, other=0), mask=used, other=0.0
    )
    live = used & (HAS_KL | (advantage != 0.0))
    line = partials + program * SAMPLE_PARTIALS
    tl.store(line + 0, tl.sum(used.to(tl.float32), axis=0))
    tl.store(line + 1, tl.sum(live.to(tl.float32), axis=0))
    tl.store(line + 2, tl.sum((advantage > 0.0).to(tl.float32), axis=0))
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    raw = tl.zeros((BLOCK,), tl.float32)
    usable = used & (index < 0)
    capped = usable
    dropped = usable
    divergence = tl.zeros((BLOCK,), tl.float32)
    if HAS_BEHAVIOUR:
        sampled = tl.load(behaviour + index, mask=used, other=0.0)
        usable = used & (tl.abs(sampled) < float("inf"))
        dropped = used & ~(tl.abs(sampled) < float("inf"))
        difference = tl.where(
            usable, tl.load(proximal + index, mask=used, other=0.0) - sampled, 0.0
        )
        bounded = tl.where(
            difference > BOUND, BOUND, tl.where(difference < -BOUND, -BOUND, difference)
        )
        raw = tl.where(usable, tl.exp(bounded), 0.0)
        highest = tl.load(cap)
        capped = usable & (raw > highest)
        divergence = tl.where(usable, raw - 1.0 - bounded, 0.0)
        if CORRECTION == 1:
            weight = tl.where(used, tl.where(capped, highest, raw), 1.0)
        if CORRECTION == 2:
            weight = tl.where(used, tl.where(capped, 0.0, raw), 1.0)
    tl.store(line + 3, tl.sum(usable.to(tl.float32), axis=0))
    tl.store(line + 4, tl.sum(raw, axis=0))
    tl.store(line + 5, tl.sum(capped.to(tl.float32), axis=0))
    tl.store(line + 6, tl.sum(dropped.to(tl.float32), axis=0))
    tl.store(line + 7, tl.sum(divergence, axis=0))
    tl.store(line + 8, tl.max(raw, axis=0))
    tl.store(weights + index, weight, mask=inside)
