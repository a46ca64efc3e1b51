"""From log-probs to loss, row coefficients and metrics: the part of the policy loss that never sees
the vocabulary.

Invariant: `coefficients_L` is the exact derivative of the loss by each row's log-prob, so the
gradient by the logits is `coefficient * (onehot - softmax) / temperature`, for the token-level and
for the sequence-level ratio alike.

Shapes: L rows (all unmasked rows of whole sequences for the sequence-level ratio), S sequences, M
metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .policy_reference import (
    PolicyRows,
    log_ratio_of,
    logit_metrics_of,
    reference_kl_of,
    surrogate_of,
)
from .settings import LOG_RATIO_BOUND, PolicyLossSettings


@dataclass(frozen=True)
class PolicyTerms:
    """loss: 0-dim. coefficients_L: dloss / dlog_prob. metrics_M: LOGIT_METRICS, float64."""

    loss: Tensor
    coefficients_L: Tensor
    metrics_M: Tensor


def policy_terms(
    log_probs_L: Tensor, entropy_L: Tensor, rows: PolicyRows, settings: PolicyLossSettings
) -> PolicyTerms:
    """The surrogate, its derivative and its metrics; `rows.weights_T` must be known."""
    advantages_L, scales_L = rows.of_sequence(rows.advantages_S), rows.of_sequence(rows.scales_S)
    weights_L = torch.ones_like(log_probs_L) if rows.weights_T is None else rows.weights_T
    log_ratio_L = log_ratio_of(log_probs_L, rows, settings)
    ratio_L = log_ratio_L.exp()
    policy_loss_L = weights_L * surrogate_of(ratio_L, advantages_L, settings)
    kl_L = reference_kl_of(log_probs_L, rows)
    loss = (scales_L * (policy_loss_L + settings.kl_coefficient * kl_L)).sum()
    slopes_L = scales_L * weights_L * _surrogate_slope(log_ratio_L, advantages_L, settings)
    coefficients_L = _through_ratio(slopes_L, rows, settings)
    if rows.reference_log_probs_T is not None and settings.kl_coefficient > 0:
        coefficients_L = coefficients_L + scales_L * settings.kl_coefficient * _kl_slope(
            log_probs_L, rows
        )
    metrics_M = logit_metrics_of(
        log_probs_L,
        entropy_L,
        log_ratio_L,
        policy_loss_L,
        kl_L,
        advantages_L,
        rows.mask_T,
        settings,
    )
    return PolicyTerms(loss, coefficients_L, metrics_M)


def _surrogate_slope(
    log_ratio_L: Tensor, advantages_L: Tensor, settings: PolicyLossSettings
) -> Tensor:
    """dsurrogate / dlog_ratio = -A r where the unclipped branch is the active one, else exactly 0
    (never 0 * inf)."""
    ratio_L = log_ratio_L.exp()
    lowest = 1.0 - settings.clip_low
    highest = float("inf") if settings.dual_clip is None else settings.dual_clip
    rising_L = (advantages_L > 0) & (ratio_L <= 1.0 + settings.clip_high)
    falling_L = (advantages_L < 0) & (ratio_L >= lowest) & (ratio_L <= highest)
    active_L = (rising_L | falling_L) & (log_ratio_L.abs() < LOG_RATIO_BOUND)
    return torch.where(active_L, -advantages_L * ratio_L, 0.0)


def _through_ratio(slopes_L: Tensor, rows: PolicyRows, settings: PolicyLossSettings) -> Tensor:
    """Derivative by the log-ratio -> derivative by each log-prob: itself, or spread over the
    sequence's mean."""
    if settings.ratio_level == "token":
        return slopes_L
    zeros_S = slopes_L.new_zeros(len(rows.advantages_S))
    counts_S = zeros_S.index_add(0, rows.sequence_ids_T, rows.mask_T.to(slopes_L.dtype)).clamp(
        min=1
    )
    means_S = zeros_S.index_add(0, rows.sequence_ids_T, slopes_L) / counts_S
    return torch.where(rows.mask_T, means_S[rows.sequence_ids_T], 0.0)


def _kl_slope(log_probs_L: Tensor, rows: PolicyRows) -> Tensor:
    """dk3 / dlog_prob = 1 - exp(reference - log_prob), 0 where the difference is clamped."""
    if rows.reference_log_probs_T is None:
        raise RuntimeError("the KL term was switched on without reference log-probs")
    difference_L = torch.where(rows.mask_T, rows.reference_log_probs_T - log_probs_L, 0.0)
    inside_L = difference_L.abs() < LOG_RATIO_BOUND
    return torch.where(inside_L, 1.0 - torch.where(inside_L, difference_L, 0.0).exp(), 0.0)
