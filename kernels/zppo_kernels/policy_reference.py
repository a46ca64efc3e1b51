"""The policy loss in plain torch: every [T, V] tensor materialised, gradients by autograd, any
floating dtype.

This is what the fused kernels must equal; in float64 it is the oracle of the tests.

Shapes: T rows (tokens, any packing), H hidden, V vocabulary, S sequences. Row t of the logits
predicts target_ids_T[t].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .metrics import POLICY_METRICS, named
from .settings import LOG_RATIO_BOUND, PolicyLossSettings


@dataclass(frozen=True)
class PolicyLossOutput:
    """loss: 0-dim, with gradient. metrics: sums, counts and maxima (`zppo_kernels.metrics`),
    float64, without gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PolicyRows:
    """Everything the loss needs per row besides the logits; checked and completed by
    `policy_inputs.prepare_rows`."""

    target_ids_T: Tensor  # int64
    sequence_ids_T: Tensor  # int64 index into the [S] tensors
    advantages_S: Tensor
    scales_S: Tensor  # what one token of sequence s weighs in the loss: 1 / denominator
    proximal_log_probs_T: Tensor
    mask_T: Tensor  # bool: row takes part
    behaviour_log_probs_T: Tensor | None = None
    reference_log_probs_T: Tensor | None = None
    weights_T: Tensor | None = None  # importance weights, once they are known

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields but the weights, in order: the arguments of the custom operators."""
        return tuple(
            getattr(self, field.name) for field in fields(self) if field.name != "weights_T"
        )

    def of_sequence(self, values_S: Tensor) -> Tensor:
        """The value of each row's sequence [T]; 0 for masked rows, so that no NaN of theirs reaches
        a sum."""
        return torch.where(self.mask_T, values_S[self.sequence_ids_T], 0.0)

    def part(self, rows: slice) -> PolicyRows:
        """The same record for a slice of the rows."""
        return self._narrowed(lambda column_T: column_T[rows])

    def picked(self, index_L: Tensor) -> PolicyRows:
        """The same record for these rows."""
        return self._narrowed(lambda column_T: column_T.index_select(0, index_L))

    def _narrowed(self, pick: Callable[[Tensor], Tensor]) -> PolicyRows:
        changes = {
            field.name: pick(value)
            for field in fields(self)
            if field.name.endswith("_T") and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **changes)


def log_probs_reference(
    logits_TV: Tensor, target_ids_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of the target and entropy of each row; 0 for rows whose target is negative
    (-100)."""
    log_probs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    picked_T = log_probs_TV.gather(1, target_ids_T.clamp(min=0).unsqueeze(1)).squeeze(1)
    # exp(-inf) * -inf is NaN, so impossible tokens are left out by selection and not by
    # multiplication.
    terms_TV = torch.where(torch.isneginf(log_probs_TV), 0.0, log_probs_TV.exp() * log_probs_TV)
    valid_T = target_ids_T >= 0
    return torch.where(valid_T, picked_T, 0.0), torch.where(valid_T, -terms_TV.sum(-1), 0.0)


def policy_loss_reference(
    logits_TV: Tensor, rows: PolicyRows, settings: PolicyLossSettings
) -> PolicyLossOutput:
    """Clipped surrogate over materialised logits, differentiable by autograd."""
    log_probs_T, entropy_T = log_probs_reference(logits_TV, rows.target_ids_T, settings.temperature)
    advantages_T = rows.of_sequence(rows.advantages_S).to(log_probs_T.dtype)
    scales_T = rows.of_sequence(rows.scales_S).to(log_probs_T.dtype)
    log_ratio_T = log_ratio_of(log_probs_T, rows, settings)
    ratio_T = log_ratio_T.exp()
    surrogate_T = surrogate_of(ratio_T, advantages_T, settings)
    weight_T, sample_metrics = correction_of(rows, settings)
    kl_T = reference_kl_of(log_probs_T, rows)
    loss_T = weight_T * surrogate_T + settings.kl_coefficient * kl_T
    loss = torch.where(rows.mask_T, loss_T * scales_T, 0.0).sum()
    with torch.no_grad():
        policy_loss_T = weight_T * surrogate_T
        values_M = logit_metrics_of(
            log_probs_T,
            entropy_T,
            log_ratio_T,
            policy_loss_T,
            kl_T,
            advantages_T,
            rows.mask_T,
            settings,
        )
    return PolicyLossOutput(loss, named(POLICY_METRICS, torch.cat([sample_metrics, values_M])))


def log_ratio_of(log_probs_T: Tensor, rows: PolicyRows, settings: PolicyLossSettings) -> Tensor:
    """log(policy / proximal) per token, or its mean over the sequence; clamped before any exp,
    masked rows 0."""
    log_ratio_T = torch.where(
        rows.mask_T, log_probs_T - rows.proximal_log_probs_T.to(log_probs_T.dtype), 0.0
    )
    if settings.ratio_level == "sequence":
        zeros_S = log_ratio_T.new_zeros(len(rows.advantages_S))
        counts_S = zeros_S.index_add(
            0, rows.sequence_ids_T, rows.mask_T.to(log_ratio_T.dtype)
        ).clamp(min=1)
        means_S = zeros_S.index_add(0, rows.sequence_ids_T, log_ratio_T) / counts_S
        log_ratio_T = torch.where(rows.mask_T, means_S[rows.sequence_ids_T], 0.0)
    return log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def surrogate_of(ratio_T: Tensor, advantages_T: Tensor, settings: PolicyLossSettings) -> Tensor:
    """max(-A r, -A clip(r)), and for A < 0 at most -A * dual_clip."""
    clipped_T = ratio_T.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    surrogate_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * clipped_T)
    if settings.dual_clip is None:
        return surrogate_T
    return torch.where(
        advantages_T < 0,
        torch.minimum(surrogate_T, -advantages_T * settings.dual_clip),
        surrogate_T,
    )


def reference_kl_of(log_probs_T: Tensor, rows: PolicyRows) -> Tensor:
    """k3 estimate of KL(policy || reference) per row; 0 without reference log-probs."""
    if rows.reference_log_probs_T is None:
        return torch.zeros_like(log_probs_T)
    difference_T = torch.where(
        rows.mask_T, rows.reference_log_probs_T.to(log_probs_T.dtype) - log_probs_T, 0.0
    )
    difference_T = difference_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return difference_T.exp() - 1.0 - difference_T


def live_of(rows: PolicyRows, settings: PolicyLossSettings) -> Tensor:
    """Which rows [T] carry a gradient at all."""
    if settings.kl_coefficient > 0:
        return rows.mask_T
    return rows.mask_T & (rows.of_sequence(rows.advantages_S) != 0)


def correction_of(rows: PolicyRows, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """Importance weights [T] that multiply the surrogate, and the values of SAMPLE_METRICS.

    A behaviour log-prob that is not finite drops its token (weight 0) when a correction is on.
    """
    proximal_T, behaviour_T = rows.proximal_log_probs_T, rows.behaviour_log_probs_T
    advantages_T = rows.of_sequence(rows.advantages_S)
    known_T = rows.mask_T if behaviour_T is not None else torch.zeros_like(rows.mask_T)
    usable_T = known_T & torch.isfinite(behaviour_T if behaviour_T is not None else proximal_T)
    difference_T = (
        proximal_T - behaviour_T if behaviour_T is not None else torch.zeros_like(proximal_T)
    )
    log_weight_T = torch.where(usable_T, difference_T, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    raw_T = log_weight_T.exp()
    capped_T = usable_T & (raw_T > settings.correction_cap)
    sums = [
        rows.mask_T,
        live_of(rows, settings),
        rows.mask_T & (advantages_T > 0),
        usable_T,
        torch.where(usable_T, raw_T, 0.0),
        capped_T,
        known_T & ~usable_T,
        torch.where(usable_T, raw_T - 1.0 - log_weight_T, 0.0),
    ]
    largest = torch.where(usable_T, raw_T, 0.0).double()
    maximum = largest.max() if largest.numel() else largest.sum()
    values_M = torch.stack([value.sum(dtype=torch.float64) for value in sums] + [maximum])
    if behaviour_T is None or settings.correction == "none":
        return torch.ones_like(raw_T), values_M
    above_T = (
        torch.full_like(raw_T, settings.correction_cap)
        if settings.correction == "truncate"
        else torch.zeros_like(raw_T)
    )
    return torch.where(usable_T, torch.where(capped_T, above_T, raw_T), 0.0), values_M


def logit_metrics_of(
    log_probs_T: Tensor,
    entropy_T: Tensor,
    log_ratio_T: Tensor,
    policy_loss_T: Tensor,
    kl_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    settings: PolicyLossSettings,
) -> Tensor:
    """The values of LOGIT_METRICS, float64 [M]."""
    ratio_T = log_ratio_T.exp()
    dual_clip = float("inf") if settings.dual_clip is None else settings.dual_clip
    sums = [
        torch.ones_like(ratio_T),
        log_probs_T,
        entropy_T,
        ratio_T,
        ratio_T - 1.0 - log_ratio_T,
        (advantages_T < 0) & (ratio_T < 1.0 - settings.clip_low),
        (advantages_T > 0) & (ratio_T > 1.0 + settings.clip_high),
        (advantages_T < 0) & (ratio_T > dual_clip),
        policy_loss_T,
        kl_T,
    ]
    values = [torch.where(mask_T, value, 0.0).sum(dtype=torch.float64) for value in sums]
    masked_T = torch.where(mask_T, ratio_T, 0.0).double()
    values.append(masked_T.max() if masked_T.numel() else masked_T.sum())
    return torch.stack(values)
