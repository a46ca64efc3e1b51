"""From log-probs to loss, row coefficients and metrics: the part of the policy loss that never sees
the vocabulary.

Invariant: `coefficients_L` and `entropy_coefficients_L` are the exact derivatives of the loss by
each row's log-prob and entropy, so with p = softmax(logits / temperature) the gradient by the
logits is

    (coefficient * (onehot - p) - entropy_coefficient * p * (log p + entropy)) / temperature

for the token-level and for the sequence-level ratio alike.

Shapes: L rows (all unmasked rows of whole sequences where a sequence decides), M metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .policy_reference import (
    correction_of,
    kl_of_gap,
    logit_metrics_of,
    ratios_of,
    reference_gap_of,
)
from .policy_rows import PolicyRows
from .settings import LOG_RATIO_BOUND, PolicyLossSettings
from .surrogates import SURROGATES, Ratios, sapo_sharpness_of, weight_of


@dataclass(frozen=True)
class PolicyTerms:
    """loss: 0-dim. coefficients_L, entropy_coefficients_L: derivatives by log-prob and entropy; the
    second is None without an entropy term. metrics_M: LOGIT_METRICS, float64."""

    loss: Tensor
    coefficients_L: Tensor
    entropy_coefficients_L: Tensor | None
    metrics_M: Tensor

    def part(self, rows: slice) -> PolicyTerms:
        """The same loss and metrics with the coefficients of a slice of the rows."""
        entropy_L = self.entropy_coefficients_L
        return replace(
            self,
            coefficients_L=self.coefficients_L[rows],
            entropy_coefficients_L=None if entropy_L is None else entropy_L[rows],
        )


@torch.no_grad()
def policy_terms(
    log_probs_L: Tensor, entropy_L: Tensor, rows: PolicyRows, settings: PolicyLossSettings
) -> PolicyTerms:
    """The loss, its derivatives and its metrics. Without `rows.weights_T` they are formed here."""
    if rows.proximal_log_probs_T is None:
        rows = replace(rows, proximal_log_probs_T=log_probs_L)
    weights_L = correction_of(rows, settings)[0] if rows.weights_T is None else rows.weights_T
    ratios = ratios_of(log_probs_L, rows, settings)
    policy_loss_L = weights_L * SURROGATES[settings.surrogate](ratios, settings)
    slopes_L = rows.scales_T * weights_L * _SLOPES[settings.surrogate](ratios, settings)
    kl_L, kl_slopes_L, kl_ratio_slopes_L = _kl_terms(ratios, rows, settings)
    loss_L = policy_loss_L + settings.kl_coefficient * kl_L
    entropy_coefficients_L = None
    if settings.entropy_coefficient > 0:
        loss_L = loss_L - settings.entropy_coefficient * torch.where(rows.mask_T, entropy_L, 0.0)
        entropy_coefficients_L = -rows.scales_T * settings.entropy_coefficient
    kl_scales_L = rows.scales_T * settings.kl_coefficient
    if settings.weighs_log_prob:
        coefficients_L = slopes_L + _through_ratio(kl_scales_L * kl_ratio_slopes_L, rows, settings)
    else:
        coefficients_L = _through_ratio(slopes_L + kl_scales_L * kl_ratio_slopes_L, rows, settings)
    return PolicyTerms(
        (rows.scales_T * loss_L).sum(),
        coefficients_L + kl_scales_L * kl_slopes_L,
        entropy_coefficients_L,
        logit_metrics_of(ratios, entropy_L, policy_loss_L, rows, settings),
    )


def _clip_slope(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """-A r where the unclipped branch is the active one, else exactly 0 (never 0 * inf)."""
    ratio_L, advantages_L = ratios.ratio_T, ratios.advantages_T
    highest = float("inf") if settings.dual_clip is None else settings.dual_clip
    rising_L = (advantages_L > 0) & (ratio_L <= 1.0 + settings.clip_high)
    falling_L = (advantages_L < 0) & (ratio_L >= 1.0 - settings.clip_low) & (ratio_L <= highest)
    return torch.where((rising_L | falling_L) & _inside(ratios), -advantages_L * ratio_L, 0.0)


def _sapo_slope(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """-4 A r s (1 - s) with s = sigmoid(tau (r - 1))."""
    ratio_L = ratios.ratio_T
    gate_L = torch.sigmoid(sapo_sharpness_of(ratios, settings) * (ratio_L - 1.0))
    slope_L = -4.0 * ratios.advantages_T * ratio_L * gate_L * (1.0 - gate_L)
    return torch.where(_inside(ratios), slope_L, 0.0)


def _weight_slope(ratios: Ratios, settings: PolicyLossSettings) -> Tensor:
    """-A w, by the log-prob."""
    return -ratios.advantages_T * weight_of(ratios, settings)


# dsurrogate / dlog_ratio; for `settings.weighs_log_prob`, dsurrogate / dlog_prob
_SLOPES: dict[str, Callable[[Ratios, PolicyLossSettings], Tensor]] = {
    "clip": _clip_slope,
    "cispo": _weight_slope,
    "sapo": _sapo_slope,
    "dppo_tv": _weight_slope,
    "dppo_kl": _weight_slope,
}


def _kl_terms(
    ratios: Ratios, rows: PolicyRows, settings: PolicyLossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL term and its derivatives by log-prob and by log-ratio, 0 where they are clamped."""
    gap_L = reference_gap_of(ratios.log_probs_T, rows)
    kl_L, zeros_L = kl_of_gap(gap_L, settings.kl_estimator), torch.zeros_like(gap_L)
    if rows.reference_log_probs_T is None:
        return kl_L, zeros_L, zeros_L
    slope_L = _kl_slope(gap_L, settings)
    if settings.kl_correction == "importance":
        kl_L = ratios.ratio_T * kl_L
        return kl_L, ratios.ratio_T * slope_L, torch.where(_inside(ratios), kl_L, 0.0)
    return kl_L, slope_L, zeros_L


def _kl_slope(gap_L: Tensor, settings: PolicyLossSettings) -> Tensor:
    """dkl / dlog_prob = -dkl / dgap."""
    estimator = "k2" if settings.kl_correction == "straight_through" else settings.kl_estimator
    if estimator == "k1":
        slope_L = torch.ones_like(gap_L)
    else:
        slope_L = -gap_L if estimator == "k2" else 1.0 - gap_L.exp()
    return torch.where(gap_L.abs() < LOG_RATIO_BOUND, slope_L, 0.0)


def _inside(ratios: Ratios) -> Tensor:
    """Where the log-ratio was not clamped, which would end its gradient."""
    return ratios.log_ratio_T.abs() < LOG_RATIO_BOUND


def _through_ratio(slopes_L: Tensor, rows: PolicyRows, settings: PolicyLossSettings) -> Tensor:
    """Derivative by the log-ratio -> derivative by each log-prob: itself, or spread over the
    sequence's mean."""
    if settings.ratio_level == "token":
        return slopes_L
    counts_S = rows.sum_by_sequence(rows.mask_T.to(slopes_L.dtype)).clamp(min=1)
    means_S = rows.sum_by_sequence(slopes_L) / counts_S
    return torch.where(rows.mask_T, means_S[rows.sequence_ids_T], 0.0)
