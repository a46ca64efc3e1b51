"""Triton kernel for what is known before the logits: importance weights and metrics.SAMPLE_METRICS,
one launch over all rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .metrics import SAMPLE_METRICS
from .triton_policy import clamped, importance_weight

SAMPLE_PARTIALS = tl.constexpr(len(SAMPLE_METRICS))


@triton.jit
def samples_kernel(
    mask,
    live,
    advantages,
    proximal,
    behaviour,
    weights,
    partials,
    rows,
    floor,
    cap,
    CORRECTION: tl.constexpr,
    HAS_BEHAVIOUR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CORRECTION: place among settings.CHOICES."""
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    used = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
    is_live = used & (tl.load(live + index, mask=inside, other=0) != 0)
    advantage = tl.load(advantages + index, mask=used, other=0.0)
    line = partials + program * SAMPLE_PARTIALS
    tl.store(line + 0, tl.sum(used.to(tl.float32), axis=0))
    tl.store(line + 1, tl.sum(is_live.to(tl.float32), axis=0))
    tl.store(line + 2, tl.sum((advantage > 0.0).to(tl.float32), axis=0))
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    raw = tl.zeros((BLOCK,), tl.float32)
    usable = used & (index < 0)
    outside = usable
    dropped = usable
    divergence = tl.zeros((BLOCK,), tl.float32)
    if HAS_BEHAVIOUR:
        sampled = tl.load(behaviour + index, mask=used, other=0.0)
        usable = used & (tl.abs(sampled) < float("inf"))
        dropped = used & ~usable
        log_weight = clamped(
            tl.where(usable, tl.load(proximal + index, mask=used, other=0.0) - sampled, 0.0)
        )
        raw = tl.exp(log_weight)
        outside = usable & ((raw > cap) | (raw < floor))
        divergence = tl.where(usable, raw - 1.0 - log_weight, 0.0)
        weight = tl.where(used, importance_weight(raw, usable, floor, cap, CORRECTION), 1.0)
        raw = tl.where(usable, raw, 0.0)
    tl.store(line + 3, tl.sum(usable.to(tl.float32), axis=0))
    tl.store(line + 4, tl.sum(raw, axis=0))
    tl.store(line + 5, tl.sum(outside.to(tl.float32), axis=0))
    tl.store(line + 6, tl.sum(dropped.to(tl.float32), axis=0))
    tl.store(line + 7, tl.sum(divergence, axis=0))
    tl.store(line + 8, tl.max(raw, axis=0))
    tl.store(weights + index, weight, mask=inside)
