"""From a row's log-prob and entropy to its loss, its metrics and the two coefficients of its
gradient: the part of the policy kernel that never sees the vocabulary. The formulas are those of
`surrogates` and `policy_terms`.

Choices are constexpr, their place among settings.CHOICES; numbers are run-time arguments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .metrics import LOGIT_METRICS
from .settings import CHOICES, LOG_RATIO_BOUND

# Kernels may only read globals that are constexpr.
BOUND = tl.constexpr(LOG_RATIO_BOUND)
ROW_METRICS = tl.constexpr(1 + len(LOGIT_METRICS))  # the loss before them
CISPO, SAPO, DPPO_TV, DPPO_KL = (
    tl.constexpr(CHOICES["surrogate"].index(name))
    for name in ("cispo", "sapo", "dppo_tv", "dppo_kl")
)
TRUNCATE, MASK = (tl.constexpr(CHOICES["correction"].index(name)) for name in ("truncate", "mask"))
K1, K2 = (tl.constexpr(CHOICES["kl_estimator"].index(name)) for name in ("k1", "k2"))
IMPORTANCE, STRAIGHT_THROUGH = (
    tl.constexpr(CHOICES["kl_correction"].index(name))
    for name in ("importance", "straight_through")
)


@triton.jit
def clamped(x):
    """x within the log-ratio bound; unlike minimum and maximum, a NaN stays one."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@triton.jit
def importance_weight(raw, is_usable, floor, cap, CORRECTION: tl.constexpr):
    """What a token's surrogate is multiplied by; raw = exp(proximal - behaviour)."""
    weight = raw * 0.0 + 1.0
    is_outside = (raw > cap) | (raw < floor)
    if CORRECTION == TRUNCATE:
        weight = tl.where(
            is_usable, tl.where(raw > cap, cap, tl.where(raw < floor, floor, raw)), 0.0
        )
    if CORRECTION == MASK:
        weight = tl.where(is_usable & ~is_outside, raw, 0.0)
    return weight


@triton.jit
def _weighted(advantage, weight, log_prob):
    """-A w log_prob and its slope; 0 without an advantage, where the log-prob may be -inf."""
    slope = -advantage * weight
    return tl.where(advantage == 0.0, 0.0, slope * log_prob), slope


@triton.jit
def _is_far(log_prob, proximal, advantage, low, high, KIND: tl.constexpr):
    """DPPO's mask: the probability moved beyond its bound, in the direction of the gradient."""
    now, before = tl.exp(log_prob), tl.exp(proximal)
    if KIND == DPPO_TV:
        divergence = tl.abs(now - before)
    else:
        token = tl.where(before == 0.0, 0.0, before * (proximal - log_prob))
        others = (1.0 - before) * tl.log((1.0 - before + 1e-8) / (1.0 - now + 1e-8))
        divergence = token + others
    return tl.where(
        advantage > 0.0,
        (divergence > high) & (now > before),
        (divergence > low) & (now < before),
    )


@triton.jit
def _surrogate(
    log_ratio, log_prob, proximal, advantage, clip_low, clip_high, dual_clip, sapo_positive,
    sapo_negative, KIND: tl.constexpr,
):  # fmt: skip
    """Value, slope by the log-prob, and whether the lower, upper and dual bound were met."""
    ratio = tl.exp(log_ratio)
    is_inside = tl.abs(log_ratio) < BOUND
    lowest, highest = 1.0 - clip_low, 1.0 + clip_high
    is_low, is_high, is_dual = ratio < lowest, ratio > highest, ratio > dual_clip
    if KIND == CISPO:
        weight = tl.where(is_low, lowest, tl.where(is_high, highest, ratio))
        value, slope = _weighted(advantage, weight, log_prob)
        is_dual = is_dual & False
    elif KIND == SAPO:
        sharpness = tl.where(advantage > 0.0, sapo_positive, sapo_negative)
        gate = tl.sigmoid(sharpness * (ratio - 1.0))
        value = -advantage * gate * 4.0 / sharpness
        slope = tl.where(is_inside, -4.0 * advantage * ratio * gate * (1.0 - gate), 0.0)
        is_low, is_high, is_dual = is_low & False, is_high & False, is_dual & False
    elif KIND == DPPO_TV or KIND == DPPO_KL:  # noqa: SIM109 - no tuples in Triton
        is_far = _is_far(log_prob, proximal, advantage, clip_low, clip_high, KIND)
        weight = tl.where(is_far, 0.0, tl.where(is_dual, dual_clip, ratio))
        value, slope = _weighted(advantage, weight, log_prob)
        is_dual = is_dual & ~is_far
        is_low, is_high = is_far & (advantage <= 0.0), is_far & (advantage > 0.0)
    else:
        is_low, is_high = (advantage < 0.0) & is_low, (advantage > 0.0) & is_high
        is_dual = (advantage < 0.0) & is_dual
        bounded = tl.where(
            is_low, lowest, tl.where(is_high, highest, tl.where(is_dual, dual_clip, ratio))
        )
        value = -advantage * bounded
        is_active = ~(is_low | is_high | is_dual) & is_inside
        slope = tl.where(is_active, -advantage * ratio, 0.0)
    return value, slope, is_low, is_high, is_dual


@triton.jit
def _kl(gap, ESTIMATOR: tl.constexpr):
    """Estimate of KL(policy || reference) and its slope by the log-prob, from log(reference /
    policy); the slope is 0 where the gap is clamped."""
    bounded = clamped(gap)
    if ESTIMATOR == K1:
        value, slope = -bounded, bounded * 0.0 + 1.0
    elif ESTIMATOR == K2:
        value, slope = 0.5 * bounded * bounded, -bounded
    else:
        value, slope = tl.exp(bounded) - 1.0 - bounded, 1.0 - tl.exp(bounded)
    return value, tl.where(tl.abs(gap) < BOUND, slope, 0.0)


@triton.jit
def policy_terms(
    index, log_prob, entropy, advantages, scales, weights, proximal, behaviour, reference,
    log_probs, entropies, row_metrics, clip_low, clip_high, dual_clip, sapo_positive, sapo_negative,
    floor, cap, kl_coefficient, entropy_coefficient, SURROGATE: tl.constexpr,
    CORRECTION: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_CORRECTION: tl.constexpr,
    HAS_PROXIMAL: tl.constexpr, WEIGHTS_ARE_LATE: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Derivatives of the loss by the row's log-prob and by its entropy; its statistics, and one
    line of `row_metrics`."""
    advantage, scale = tl.load(advantages + index), tl.load(scales + index)
    old = log_prob
    if HAS_PROXIMAL:
        old = tl.load(proximal + index)
    weight = tl.load(weights + index)
    if WEIGHTS_ARE_LATE:
        sampled = tl.load(behaviour + index)
        is_usable = tl.abs(sampled) < float("inf")
        raw = tl.exp(clamped(tl.where(is_usable, log_prob - sampled, 0.0)))
        weight = importance_weight(raw, is_usable, floor, cap, CORRECTION)
    log_ratio = clamped(log_prob - old)
    ratio = tl.exp(log_ratio)
    value, slope, is_low, is_high, is_dual = _surrogate(
        log_ratio, log_prob, old, advantage, clip_low, clip_high, dual_clip, sapo_positive,
        sapo_negative, SURROGATE,
    )  # fmt: skip
    policy_loss = value * weight
    slope = slope * weight
    divergence, penalty = 0.0, 0.0
    if HAS_REFERENCE:
        gap = tl.load(reference + index) - log_prob
        divergence, kl_slope = _kl(gap, KL_ESTIMATOR)
        penalty = divergence
        if KL_CORRECTION == STRAIGHT_THROUGH:
            _, kl_slope = _kl(gap, K2)
        if KL_CORRECTION == IMPORTANCE:
            penalty = ratio * divergence
            kl_slope = ratio * kl_slope + tl.where(tl.abs(log_ratio) < BOUND, penalty, 0.0)
        slope += kl_coefficient * kl_slope
    loss = policy_loss + kl_coefficient * penalty
    if HAS_ENTROPY:
        loss -= entropy_coefficient * entropy
    tl.store(log_probs + index, log_prob)
    tl.store(entropies + index, entropy)
    line = row_metrics + index * ROW_METRICS
    tl.store(line + 0, scale * loss)
    tl.store(line + 1, 1.0)
    tl.store(line + 2, log_prob)
    tl.store(line + 3, entropy)
    tl.store(line + 4, ratio)
    tl.store(line + 5, ratio - 1.0 - log_ratio)
    tl.store(line + 6, is_low.to(tl.float32))
    tl.store(line + 7, is_high.to(tl.float32))
    tl.store(line + 8, is_dual.to(tl.float32))
    tl.store(line + 9, policy_loss)
    tl.store(line + 10, divergence)
    tl.store(line + 11, ratio)
    return slope * scale, -entropy_coefficient * scale
