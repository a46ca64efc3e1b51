"""The compiled loops of `rows_numba`: float32 over the vocabulary, float64 for everything there is
one of per row.

Sums over the vocabulary are taken in float32 blocks of 1,024 and added in float64, so their error
does not grow with V. `-inf` logits have probability 0; NaN logits give a NaN row.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba import compiled
from ._numba_terms import ENTROPY_COEFFICIENT, TEMPERATURE, importance_weight, row_terms

_F = np.float32
_BLOCK = 1024
_LANES = 64

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


@compiled(fastmath={"contract"})
def _scale_by_line(
    row_V: np.ndarray,
    source_V: np.ndarray,
    highest: np.float32,
    inverse_temperature: np.float32,
    constant: np.float32,
    slope: np.float32,
) -> None:
    """row *= constant + slope * x with x = (source - highest) / temperature, finite where row is
    0."""
    for column in range(len(row_V)):
        x = (source_V[column] - highest) * inverse_temperature
        floored = _SMALLEST if x < _SMALLEST else x
        row_V[column] *= constant + slope * floored


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
    log_probability_C: np.ndarray,
    temperature: float,
) -> None:
    """gradient = softmax * (probability_C + log_probability_C * log softmax) + label_C *
    onehot(target); an empty log_probability_C is 0."""
    inverse = _F(1.0 / temperature)
    has_line = len(log_probability_C) > 0
    kept_V = np.empty(logits_CV.shape[1] if has_line else 0, np.float32)
    for row in range(len(lse_C)):
        anchor = _F(lse_C[row] * temperature)
        if has_line and log_probability_C[row] != 0.0:
            kept_V[:] = logits_CV[row]
            _row_exponentials(logits_CV[row], gradient_CV[row], anchor, inverse)
            line = _F(probability_C[row]), _F(log_probability_C[row])
            _scale_by_line(gradient_CV[row], kept_V, anchor, inverse, line[0], line[1])
        elif probability_C[row] == 0.0:
            gradient_CV[row, :] = 0.0
        else:
            _row_exponentials(logits_CV[row], gradient_CV[row], anchor, inverse)
            _scale(gradient_CV[row], probability_C[row])
        gradient_CV[row, target_ids_C[row]] += label_C[row]


@compiled()
def policy_rows(
    logits_CV: np.ndarray,
    gradient_CV: np.ndarray,
    wants_gradient: bool,
    mask_C: np.ndarray,
    target_ids_C: np.ndarray,
    advantages_C: np.ndarray,
    scales_C: np.ndarray,
    weights_C: np.ndarray,
    proximal_C: np.ndarray,
    behaviour_C: np.ndarray,
    reference_C: np.ndarray,
    flags: np.ndarray,
    numbers: np.ndarray,
    choices: np.ndarray,
    statistics_2C: np.ndarray,
    result_M: np.ndarray,
) -> None:
    """The fused row: softmax, log-prob, entropy, terms (`_numba_terms`), gradient; loss and metrics
    in `result_M`. flags: is there a proximal log-prob, a weight still to be formed, a reference.
    """
    has_proximal, weights_are_late, has_reference = flags
    temperature, bonus = numbers[TEMPERATURE], numbers[ENTROPY_COEFFICIENT]
    inverse = _F(1.0 / temperature)
    lanes = np.empty(_LANES, np.float32)
    kept_V = np.empty(logits_CV.shape[1] if bonus != 0.0 else 0, np.float32)
    for row in range(len(mask_C)):
        if not mask_C[row]:
            if wants_gradient:
                gradient_CV[row, :] = 0.0
            continue
        target, scale = target_ids_C[row], scales_C[row]
        logits_V, gradient_V = logits_CV[row], gradient_CV[row]
        highest = _highest(logits_V, lanes)
        shifted = (logits_V[target] - highest) / temperature
        if wants_gradient:
            if bonus != 0.0:
                kept_V[:] = logits_V
            total, weighted = _row_exponentials(logits_V, gradient_V, highest, inverse)
        else:
            total, weighted = _row_sums(logits_V, highest, inverse)
        log_total = math.log(total) if total > 0.0 else np.nan
        log_prob = shifted - log_total
        entropy = log_total - (weighted / total if total > 0.0 else np.nan)
        statistics_2C[0, row], statistics_2C[1, row] = log_prob, entropy
        result_M[1] += 1
        result_M[2] += log_prob
        result_M[3] += entropy
        proximal = proximal_C[row] if has_proximal else log_prob
        weight = weights_C[row]
        if weights_are_late:
            weight = importance_weight(log_prob, behaviour_C[row], numbers, choices)
        loss, slope = row_terms(
            log_prob,
            proximal,
            reference_C[row],
            advantages_C[row],
            weight,
            has_reference,
            numbers,
            choices,
            result_M,
        )
        if bonus != 0.0:
            loss -= bonus * entropy
        result_M[0] += loss * scale
        if not wants_gradient:
            continue
        coefficient = slope * scale / temperature
        if bonus != 0.0:
            by_entropy = bonus * scale / temperature
            at_target = math.exp(log_prob)
            label = coefficient * (1.0 - at_target) + by_entropy * at_target * (log_prob + entropy)
            constant = by_entropy * (entropy - log_total) - coefficient
            _scale_by_line(
                gradient_V, kept_V, highest, inverse, _F(constant / total), _F(by_entropy / total)
            )
            gradient_V[target] = label
        else:
            _write_gradient(gradient_V, target, total, coefficient)


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
