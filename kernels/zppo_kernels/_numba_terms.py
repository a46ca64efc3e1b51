"""The policy loss of one row from its log-prob, compiled: the formulas of `surrogates` and
`policy_terms` for one number at a time, in float64.

`numbers` and `choices` are those of `settings.settings_values`, in their order.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba import compiled
from .settings import CHOICES, LOG_RATIO_BOUND, NUMBERS

_BOUND = LOG_RATIO_BOUND
(
    _CLIP_LOW,
    _CLIP_HIGH,
    _DUAL_CLIP,
    _SAPO_POSITIVE,
    _SAPO_NEGATIVE,
    TEMPERATURE,
    _FLOOR,
    _CAP,
    _KL_COEFFICIENT,
    ENTROPY_COEFFICIENT,
) = range(len(NUMBERS))
_SURROGATE, _, _CORRECTION, _, _KL_ESTIMATOR, _KL_CORRECTION = range(len(CHOICES))
_CISPO, _SAPO, _DPPO_TV, _DPPO_KL = (
    CHOICES["surrogate"].index(name) for name in ("cispo", "sapo", "dppo_tv", "dppo_kl")
)
_TRUNCATE, _MASK = (CHOICES["correction"].index(name) for name in ("truncate", "mask"))
_K1, _K2 = (CHOICES["kl_estimator"].index(name) for name in ("k1", "k2"))
_IMPORTANCE, _STRAIGHT_THROUGH = (
    CHOICES["kl_correction"].index(name) for name in ("importance", "straight_through")
)
_Surrogate = tuple[float, float, bool, bool, bool]


@compiled()
def _clamped(x: float) -> float:
    """x within the log-ratio bound; a NaN stays one."""
    return min(max(x, -_BOUND), _BOUND) if x == x else np.nan


@compiled()
def sample_rows(
    mask_T: np.ndarray,
    live_T: np.ndarray,
    advantages_T: np.ndarray,
    proximal_T: np.ndarray,
    behaviour_T: np.ndarray,
    has_behaviour: bool,
    numbers: np.ndarray,
    choices: np.ndarray,
    weights_T: np.ndarray,
    metrics_M: np.ndarray,
) -> None:
    """Importance weights, and SAMPLE_METRICS in their order."""
    for row in range(len(mask_T)):
        weights_T[row] = 1.0
        if not mask_T[row]:
            continue
        metrics_M[0] += 1
        metrics_M[1] += live_T[row]
        metrics_M[2] += advantages_T[row] > 0
        if not has_behaviour:
            continue
        weights_T[row] = importance_weight(proximal_T[row], behaviour_T[row], numbers, choices)
        if not math.isfinite(behaviour_T[row]):
            metrics_M[6] += 1
            continue
        log_weight = min(max(proximal_T[row] - behaviour_T[row], -_BOUND), _BOUND)
        raw = math.exp(log_weight)
        metrics_M[3] += 1
        metrics_M[4] += raw
        metrics_M[5] += raw > numbers[_CAP] or raw < numbers[_FLOOR]
        metrics_M[7] += raw - 1.0 - log_weight
        metrics_M[8] = max(metrics_M[8], raw)


@compiled()
def importance_weight(
    proximal: float, behaviour: float, numbers: np.ndarray, choices: np.ndarray
) -> float:
    """What a token's surrogate is multiplied by."""
    correction = choices[_CORRECTION]
    if correction != _TRUNCATE and correction != _MASK:
        return 1.0
    if not math.isfinite(behaviour):
        return 0.0
    raw = math.exp(min(max(proximal - behaviour, -_BOUND), _BOUND))
    bounded = max(min(raw, numbers[_CAP]), numbers[_FLOOR])
    if correction == _TRUNCATE:
        return bounded
    return raw if bounded == raw else 0.0


@compiled()
def _clip(
    log_ratio: float, log_prob: float, proximal: float, advantage: float, numbers: np.ndarray
) -> _Surrogate:
    ratio = math.exp(log_ratio)
    lowest, highest = 1.0 - numbers[_CLIP_LOW], 1.0 + numbers[_CLIP_HIGH]
    clipped = min(max(ratio, lowest), highest)
    surrogate = max(-advantage * ratio, -advantage * clipped)
    is_low = advantage < 0 and ratio < lowest
    is_high = advantage > 0 and ratio > highest
    is_dual = advantage < 0 and ratio > numbers[_DUAL_CLIP]
    if is_dual:
        surrogate = -advantage * numbers[_DUAL_CLIP]
    is_active = not (is_low or is_high or is_dual) and abs(log_ratio) < _BOUND
    return surrogate, -advantage * ratio if is_active else 0.0, is_low, is_high, is_dual


@compiled()
def _sapo(
    log_ratio: float, log_prob: float, proximal: float, advantage: float, numbers: np.ndarray
) -> _Surrogate:
    ratio = math.exp(log_ratio)
    sharpness = numbers[_SAPO_POSITIVE] if advantage > 0 else numbers[_SAPO_NEGATIVE]
    x = sharpness * (ratio - 1.0)
    fading = math.exp(-abs(x))  # never overflows
    near, far = 1.0 / (1.0 + fading), fading / (1.0 + fading)
    gate = near if x >= 0 else far
    slope = -4.0 * advantage * ratio * near * far if abs(log_ratio) < _BOUND else 0.0
    return -advantage * gate * 4.0 / sharpness, slope, False, False, False


@compiled()
def _weighted(advantage: float, weight: float, log_prob: float) -> tuple[float, float]:
    """-A w log_prob and its slope; 0 without an advantage, where the log-prob may be -inf."""
    if advantage == 0.0:
        return 0.0, 0.0
    return -advantage * weight * log_prob, -advantage * weight


@compiled()
def _cispo(
    log_ratio: float, log_prob: float, proximal: float, advantage: float, numbers: np.ndarray
) -> _Surrogate:
    ratio = math.exp(log_ratio)
    lowest, highest = 1.0 - numbers[_CLIP_LOW], 1.0 + numbers[_CLIP_HIGH]
    value, slope = _weighted(advantage, min(max(ratio, lowest), highest), log_prob)
    return value, slope, ratio < lowest, ratio > highest, False


@compiled()
def _dppo(
    log_ratio: float,
    log_prob: float,
    proximal: float,
    advantage: float,
    numbers: np.ndarray,
    by_variation: bool,
) -> _Surrogate:
    ratio, now, before = math.exp(log_ratio), math.exp(log_prob), math.exp(proximal)
    if by_variation:
        divergence = abs(now - before)
    else:
        token = before * (proximal - log_prob) if before > 0 else 0.0
        divergence = token + (1.0 - before) * math.log((1.0 - before + 1e-8) / (1.0 - now + 1e-8))
    if advantage > 0:
        is_far = divergence > numbers[_CLIP_HIGH] and now > before
    else:
        is_far = divergence > numbers[_CLIP_LOW] and now < before
    weight = 0.0 if is_far else min(ratio, numbers[_DUAL_CLIP])
    value, slope = _weighted(advantage, weight, log_prob)
    is_dual = ratio > numbers[_DUAL_CLIP] and not is_far
    return value, slope, is_far and advantage <= 0, is_far and advantage > 0, is_dual


@compiled()
def _surrogate(
    kind: int,
    log_ratio: float,
    log_prob: float,
    proximal: float,
    advantage: float,
    numbers: np.ndarray,
) -> _Surrogate:
    """Value, slope by the log-prob, and which bounds were met."""
    if kind == _CISPO:
        return _cispo(log_ratio, log_prob, proximal, advantage, numbers)
    if kind == _SAPO:
        return _sapo(log_ratio, log_prob, proximal, advantage, numbers)
    if kind in (_DPPO_TV, _DPPO_KL):
        return _dppo(log_ratio, log_prob, proximal, advantage, numbers, kind == _DPPO_TV)
    return _clip(log_ratio, log_prob, proximal, advantage, numbers)


@compiled()
def _kl(gap: float, estimator: int) -> tuple[float, float]:
    """Estimate of KL(policy || reference) and its slope by the log-prob, from log(reference /
    policy); the slope is 0 where the gap is clamped."""
    bounded, inside = _clamped(gap), abs(gap) < _BOUND
    if estimator == _K1:
        value, slope = -bounded, 1.0
    elif estimator == _K2:
        value, slope = 0.5 * bounded * bounded, -bounded
    else:
        value, slope = math.exp(bounded) - 1.0 - bounded, 1.0 - math.exp(bounded)
    return value, slope if inside else 0.0


@compiled()
def row_terms(
    log_prob: float,
    proximal: float,
    reference: float,
    advantage: float,
    weight: float,
    has_reference: bool,
    numbers: np.ndarray,
    choices: np.ndarray,
    result_M: np.ndarray,
) -> tuple[float, float]:
    """Loss of one row before scaling, without its entropy, and its derivative by the log-prob; adds
    the row to LOGIT_METRICS (from index 4 on).
    """
    log_ratio = _clamped(log_prob - proximal)
    ratio = math.exp(log_ratio)
    surrogate, slope, is_low, is_high, is_dual = _surrogate(
        choices[_SURROGATE], log_ratio, log_prob, proximal, advantage, numbers
    )
    loss = weight * surrogate if ratio == ratio else np.nan
    slope *= weight
    divergence = penalty = 0.0
    if has_reference:
        coefficient, gap = numbers[_KL_COEFFICIENT], reference - log_prob
        divergence, kl_slope = _kl(gap, choices[_KL_ESTIMATOR])
        penalty = divergence
        if choices[_KL_CORRECTION] == _STRAIGHT_THROUGH:
            kl_slope = _kl(gap, _K2)[1]
        elif choices[_KL_CORRECTION] == _IMPORTANCE:
            penalty = ratio * divergence
            kl_slope = ratio * kl_slope + (penalty if abs(log_ratio) < _BOUND else 0.0)
        slope += coefficient * kl_slope
    result_M[4] += ratio
    result_M[5] += ratio - 1.0 - log_ratio
    result_M[6] += is_low
    result_M[7] += is_high
    result_M[8] += is_dual
    result_M[9] += loss
    result_M[10] += divergence
    result_M[11] = max(result_M[11], ratio)
    return loss + numbers[_KL_COEFFICIENT] * penalty, slope
