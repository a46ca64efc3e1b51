"""The compiled loops of `rows_numba`: float32 over the vocabulary, float64 for everything there is
one of per row.

Sums over the vocabulary are taken in float32 blocks of 1,024 and added in float64, so their error
does not grow with V. `-inf` logits have probability 0; NaN logits give a NaN row.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba import compiled
from .settings import LOG_RATIO_BOUND

_F = np.float32
_BLOCK = 1024
_LANES = 64
_BOUND = LOG_RATIO_BOUND

# exp(r) on |r| <= ln(2)/2 by the Cephes polynomial; ln 2 in two parts so that the reduction loses
# nothing.
_LOG2E, _LN2_HIGH, _LN2_LOW = _F(1.4426950408889634), _F(0.693359375), _F(-2.12194440e-4)
_P0, _P1, _P2 = _F(1.9875691500e-4), _F(1.3981999507e-3), _F(8.3334519073e-3)
_P3, _P4, _P5 = _F(4.1665795894e-2), _F(1.6666665459e-1), _F(5.0000001201e-1)
_SMALLEST = _F(-87.0)
_Sums = tuple[np.float32, np.float32]


@compiled(fastmath={"contract"})
def _exp(x: np.float32) -> np.float32:
    """exp of a float32 in [-87, 0], written without a branch or a call so that the loop around it
    becomes SIMD."""
    k = np.int32(x * _LOG2E - _F(0.5))
    n = _F(k)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    p = p * (r * r) + r + _F(1.0)
    return p * np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled()
def _highest(row_V: np.ndarray, lanes: np.ndarray) -> np.float32:
    """The maximum, by way of many lanes so that the loop becomes SIMD; `lanes` is the caller's
    scratch."""
    lanes[:] = _F(-np.inf)
    full = len(row_V) // _LANES * _LANES
    for start in range(0, full, _LANES):
        part = row_V[start : start + _LANES]
        for lane in range(_LANES):
            lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
    highest = _F(-np.inf)
    for value in lanes:
        highest = value if value > highest else highest
    for value in row_V[full:]:
        highest = value if value > highest else highest
    return highest


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _block_sums(
    source_B: np.ndarray, highest: np.float32, inverse_temperature: np.float32
) -> _Sums:
    total, weighted = _F(0.0), _F(0.0)
    for column in range(len(source_B)):
        x = (source_B[column] - highest) * inverse_temperature
        floored = _SMALLEST if x < _SMALLEST else x
        p = _F(0.0) if x < _SMALLEST else _exp(floored)
        total += p
        weighted += p * floored
    return total, weighted


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _block_exponentials(
    source_B: np.ndarray, result_B: np.ndarray, highest: np.float32, inverse_temperature: np.float32
) -> _Sums:
    total, weighted = _F(0.0), _F(0.0)
    for column in range(len(source_B)):
        x = (source_B[column] - highest) * inverse_temperature
        floored = _SMALLEST if x < _SMALLEST else x
        p = _F(0.0) if x < _SMALLEST else _exp(floored)
        total += p
        weighted += p * floored
        result_B[column] = p
    return total, weighted


@compiled()
def _row_sums(
    source_V: np.ndarray, highest: np.float32, inverse_temperature: np.float32
) -> tuple[float, float]:
    """Sum of exp(x) and of exp(x) * x, with x = (logit - highest) / temperature."""
    total, weighted = 0.0, 0.0
    for start in range(0, len(source_V), _BLOCK):
        block_total, block_weighted = _block_sums(
            source_V[start : start + _BLOCK], highest, inverse_temperature
        )
        total += float(block_total)
        weighted += float(block_weighted)
    return total, weighted


@compiled()
def _row_exponentials(
    source_V: np.ndarray, result_V: np.ndarray, highest: np.float32, inverse_temperature: np.float32
) -> tuple[float, float]:
    """The same sums; exp(x) stays behind in `result_V`."""
    total, weighted = 0.0, 0.0
    for start in range(0, len(source_V), _BLOCK):
        end = start + _BLOCK
        block_total, block_weighted = _block_exponentials(
            source_V[start:end], result_V[start:end], highest, inverse_temperature
        )
        total += float(block_total)
        weighted += float(block_weighted)
    return total, weighted


@compiled(fastmath={"contract"})
def _scale(row_V: np.ndarray, factor: np.float32) -> None:
    for column in range(len(row_V)):
        row_V[column] *= factor


@compiled()
def statistics_rows(
    logits_CV: np.ndarray, target_ids_C: np.ndarray, temperature: float, results_3C: np.ndarray
) -> None:
    """Log-prob of the target, entropy and log-sum-exp of each row."""
    inverse = _F(1.0 / temperature)
    lanes = np.empty(_LANES, np.float32)
    for row in range(len(target_ids_C)):
        logits_V = logits_CV[row]
        highest = _highest(logits_V, lanes)
        total, weighted = _row_sums(logits_V, highest, inverse)
        log_total = math.log(total) if total > 0.0 else np.nan
        results_3C[0, row] = (logits_V[target_ids_C[row]] - highest) / temperature - log_total
        results_3C[1, row] = log_total - weighted / total if total > 0.0 else np.nan
        results_3C[2, row] = highest / temperature + log_total if total > 0.0 else highest


@compiled()
def gradient_rows(
    logits_CV: np.ndarray,
    gradient_CV: np.ndarray,
    lse_C: np.ndarray,
    probability_C: np.ndarray,
    target_ids_C: np.ndarray,
    label_C: np.ndarray,
    temperature: float,
) -> None:
    """gradient = probability_C * softmax + label_C * onehot(target)."""
    inverse = _F(1.0 / temperature)
    for row in range(len(lse_C)):
        if probability_C[row] == 0.0:
            gradient_CV[row, :] = 0.0
        else:
            _row_exponentials(
                logits_CV[row], gradient_CV[row], _F(lse_C[row] * temperature), inverse
            )
            _scale(gradient_CV[row], probability_C[row])
        gradient_CV[row, target_ids_C[row]] += label_C[row]


@compiled()
def sample_rows(
    mask_T: np.ndarray,
    sequence_ids_T: np.ndarray,
    advantages_S: np.ndarray,
    proximal_T: np.ndarray,
    behaviour_T: np.ndarray,
    has_behaviour: bool,
    correction: int,
    cap: float,
    has_kl: bool,
    weights_T: np.ndarray,
    metrics_M: np.ndarray,
) -> None:
    """Importance weights, and SAMPLE_METRICS in their order."""
    for row in range(len(mask_T)):
        weights_T[row] = 1.0
        if not mask_T[row]:
            continue
        advantage = advantages_S[sequence_ids_T[row]]
        metrics_M[0] += 1
        metrics_M[1] += has_kl or advantage != 0
        metrics_M[2] += advantage > 0
        if not has_behaviour:
            continue
        if not math.isfinite(behaviour_T[row]):
            metrics_M[6] += 1
            weights_T[row] = 1.0 if correction == 0 else 0.0
            continue
        log_weight = min(max(proximal_T[row] - behaviour_T[row], -_BOUND), _BOUND)
        weight = math.exp(log_weight)
        metrics_M[3] += 1
        metrics_M[4] += weight
        metrics_M[5] += weight > cap
        metrics_M[7] += weight - 1.0 - log_weight
        metrics_M[8] = max(metrics_M[8], weight)
        if correction == 1:
            weights_T[row] = min(weight, cap)
        elif correction == 2:
            weights_T[row] = weight if weight <= cap else 0.0


@compiled()
def _row_terms(
    log_prob: float,
    proximal: float,
    reference: float,
    advantage: float,
    weight: float,
    constants: np.ndarray,
    result_M: np.ndarray,
) -> tuple[float, float]:
    """Loss of one row before scaling and its derivative by the log-prob; adds the row to
    LOGIT_METRICS (from index 4 on).
    """
    clip_low, clip_high, dual_clip, _, kl_coefficient, has_reference = constants
    difference = log_prob - proximal
    log_ratio = min(max(difference, -_BOUND), _BOUND) if difference == difference else np.nan
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1.0 - clip_low), 1.0 + clip_high)
    surrogate = max(-advantage * ratio, -advantage * clipped)
    is_low = advantage < 0 and ratio < 1.0 - clip_low
    is_high = advantage > 0 and ratio > 1.0 + clip_high
    is_dual = advantage < 0 and ratio > dual_clip
    if is_dual:
        surrogate = -advantage * dual_clip
    loss = weight * surrogate if ratio == ratio else np.nan
    is_active = not (is_low or is_high or is_dual) and abs(difference) < _BOUND
    slope = -advantage * ratio * weight if is_active else 0.0
    divergence = 0.0
    if has_reference:
        gap = reference - log_prob
        bounded = min(max(gap, -_BOUND), _BOUND)
        divergence = math.exp(bounded) - 1.0 - bounded
        if abs(gap) < _BOUND:
            slope += kl_coefficient * (1.0 - math.exp(bounded))
    result_M[4] += ratio
    result_M[5] += ratio - 1.0 - log_ratio
    result_M[6] += is_low
    result_M[7] += is_high
    result_M[8] += is_dual
    result_M[9] += loss
    result_M[10] += divergence
    result_M[11] = max(result_M[11], ratio)
    return loss + kl_coefficient * divergence, slope


@compiled()
def policy_rows(
    logits_CV: np.ndarray,
    gradient_CV: np.ndarray,
    wants_gradient: bool,
    mask_C: np.ndarray,
    target_ids_C: np.ndarray,
    sequence_ids_C: np.ndarray,
    proximal_C: np.ndarray,
    weights_C: np.ndarray,
    reference_C: np.ndarray,
    advantages_S: np.ndarray,
    scales_S: np.ndarray,
    constants: np.ndarray,
    result_M: np.ndarray,
) -> None:
    """The fused row: softmax, log-prob, entropy, ratio, clips, weight, loss, metrics, gradient;
    loss and metrics in `result_M`.
    """
    temperature = constants[3]
    inverse = _F(1.0 / temperature)
    lanes = np.empty(_LANES, np.float32)
    for row in range(len(mask_C)):
        if not mask_C[row]:
            if wants_gradient:
                gradient_CV[row, :] = 0.0
            continue
        sequence, target = sequence_ids_C[row], target_ids_C[row]
        logits_V, gradient_V = logits_CV[row], gradient_CV[row]
        highest = _highest(logits_V, lanes)
        shifted = (logits_V[target] - highest) / temperature
        if wants_gradient:
            total, weighted = _row_exponentials(logits_V, gradient_V, highest, inverse)
        else:
            total, weighted = _row_sums(logits_V, highest, inverse)
        log_total = math.log(total) if total > 0.0 else np.nan
        log_prob = shifted - log_total
        result_M[1] += 1
        result_M[2] += log_prob
        result_M[3] += log_total - (weighted / total if total > 0.0 else np.nan)
        loss, slope = _row_terms(
            log_prob,
            proximal_C[row],
            reference_C[row],
            advantages_S[sequence],
            weights_C[row],
            constants,
            result_M,
        )
        result_M[0] += loss * scales_S[sequence]
        if wants_gradient:
            _write_gradient(gradient_V, target, total, slope * scales_S[sequence] / temperature)


@compiled()
def _write_gradient(gradient_V: np.ndarray, target: int, total: float, coefficient: float) -> None:
    """exp(x) -> coefficient * (onehot - softmax); the label's entry is formed in float64, where 1 -
    p does not cancel.
    """
    if coefficient == 0.0:
        gradient_V[:] = 0.0
        return
    label = coefficient * ((total - gradient_V[target]) / total)
    _scale(gradient_V, _F(-coefficient / total))
    gradient_V[target] = label
