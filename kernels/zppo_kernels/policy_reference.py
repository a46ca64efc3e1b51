"""The policy loss in plain torch: every [T, V] tensor materialised, gradients by autograd, any
floating dtype.

This is what the fused kernels must equal; in float64 it is the oracle of the tests.

Shapes: T rows (tokens, any packing), H hidden, V vocabulary, S sequences, M metrics. Row t of the
logits predicts target_ids_T[t].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .metrics import POLICY_METRICS, named
from .policy_rows import PolicyRows, RowInputs
from .settings import LOG_RATIO_BOUND, PolicyLossSettings
from .surrogates import SURROGATES, Ratios, clips_of


@dataclass(frozen=True)
class PolicyLossOutput:
    """loss: 0-dim, with gradient. metrics: sums, counts and maxima (`zppo_kernels.metrics`),
    float64. log_probs_T, entropy_T: of the policy, in the dtype of the loss, 0 for rows whose
    logits were not computed. Only the loss has a gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    log_probs_T: Tensor
    entropy_T: Tensor


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
    logits_TV: Tensor, inputs: RowInputs, settings: PolicyLossSettings
) -> PolicyLossOutput:
    """The loss over materialised logits, differentiable by autograd."""
    log_probs_T, entropy_T = log_probs_reference(
        logits_TV, inputs.target_ids_T, settings.temperature
    )
    rows = inputs.looked_up(settings).as_dtype(log_probs_T.dtype)
    if rows.proximal_log_probs_T is None:
        rows = replace(rows, proximal_log_probs_T=log_probs_T.detach())
    ratios = ratios_of(log_probs_T, rows, settings)
    surrogate_T = SURROGATES[settings.surrogate](ratios, settings)
    weight_T, sample_metrics = correction_of(rows, settings)
    kl_T = corrected_kl_of(ratios, rows, settings)
    loss_T = weight_T * surrogate_T + settings.kl_coefficient * kl_T
    loss_T = loss_T - settings.entropy_coefficient * entropy_T
    loss = torch.where(rows.mask_T, loss_T * rows.scales_T, 0.0).sum()
    with torch.no_grad():
        values_M = logit_metrics_of(ratios, entropy_T, weight_T * surrogate_T, rows, settings)
    metrics = named(POLICY_METRICS, torch.cat([sample_metrics, values_M]))
    columns = [
        torch.where(rows.mask_T, column_T.detach(), 0.0) for column_T in (log_probs_T, entropy_T)
    ]
    return PolicyLossOutput(loss, metrics, *columns)


def ratios_of(log_probs_T: Tensor, rows: PolicyRows, settings: PolicyLossSettings) -> Ratios:
    """What the surrogate is made of; the log-ratio is clamped before any exp."""
    proximal_T = rows.proximal_log_probs_T
    if proximal_T is None:
        raise RuntimeError("the ratio was asked for before the proximal log-probs were known")
    log_probs_T, proximal_T = (
        torch.where(rows.mask_T, column_T, 0.0) for column_T in (log_probs_T, proximal_T)
    )
    log_ratio_T = log_probs_T - proximal_T
    if settings.ratio_level == "sequence":
        sums_S = rows.sum_by_sequence(log_ratio_T)
        means_S = sums_S / rows.sum_by_sequence(rows.mask_T.to(sums_S.dtype)).clamp(min=1)
        log_ratio_T = torch.where(rows.mask_T, means_S[rows.sequence_ids_T], 0.0)
    log_ratio_T = log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return Ratios(log_ratio_T, log_probs_T, proximal_T, rows.advantages_T)


def reference_gap_of(log_probs_T: Tensor, rows: PolicyRows) -> Tensor:
    """log(reference / policy) of each row, clamped before any exp; 0 without a reference."""
    if rows.reference_log_probs_T is None:
        return torch.zeros_like(log_probs_T)
    gap_T = torch.where(rows.mask_T, rows.reference_log_probs_T - log_probs_T, 0.0)
    return gap_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def kl_of_gap(gap_T: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) per row (http://joschu.net/blog/kl-approx.html)."""
    if estimator == "k1":
        return -gap_T
    return 0.5 * gap_T * gap_T if estimator == "k2" else gap_T.exp() - 1.0 - gap_T


def corrected_kl_of(ratios: Ratios, rows: PolicyRows, settings: PolicyLossSettings) -> Tensor:
    """The KL term of each row: the estimate, times the ratio (`importance`), or with the gradient
    of k2 (`straight_through`)."""
    gap_T = reference_gap_of(ratios.log_probs_T, rows)
    kl_T = kl_of_gap(gap_T, settings.kl_estimator)
    if settings.kl_correction == "importance":
        return kl_T * ratios.ratio_T
    if settings.kl_correction == "straight_through":
        unbiased_T = kl_of_gap(gap_T, "k2")
        return kl_T.detach() + unbiased_T - unbiased_T.detach()
    return kl_T


def correction_of(rows: PolicyRows, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """Importance weights [T] that multiply the surrogate, and the values of SAMPLE_METRICS.

    A behaviour log-prob that is not finite drops its token (weight 0) when a correction is on.
    """
    proximal_T, behaviour_T = rows.proximal_log_probs_T, rows.behaviour_log_probs_T
    difference_T = torch.zeros_like(rows.advantages_T)
    known_T = usable_T = torch.zeros_like(rows.mask_T)
    if proximal_T is not None and behaviour_T is not None:
        known_T = rows.mask_T
        usable_T = known_T & torch.isfinite(behaviour_T)
        difference_T = torch.where(usable_T, proximal_T - behaviour_T, 0.0)
        if settings.correction_level == "sequence":
            difference_T = rows.sum_by_sequence(difference_T)[rows.sequence_ids_T]
    log_weight_T = torch.where(usable_T, difference_T, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    raw_T = log_weight_T.exp()
    floor = settings.correction_floor or 0.0
    outside_T = usable_T & ((raw_T > settings.correction_cap) | (raw_T < floor))
    sums = [
        rows.mask_T,
        rows.live_T,
        rows.mask_T & (rows.advantages_T > 0),
        usable_T,
        torch.where(usable_T, raw_T, 0.0),
        outside_T,
        known_T & ~usable_T,
        torch.where(usable_T, raw_T - 1.0 - log_weight_T, 0.0),
    ]
    largest = torch.where(usable_T, raw_T, 0.0).double()
    maximum = largest.max() if largest.numel() else largest.sum()
    values_M = torch.stack([value.sum(dtype=torch.float64) for value in sums] + [maximum])
    if proximal_T is None or behaviour_T is None or settings.correction == "none":
        return torch.ones_like(raw_T), values_M
    if settings.correction == "truncate":
        bounded_T = raw_T.clamp(floor, settings.correction_cap)
    else:
        bounded_T = torch.where(outside_T, 0.0, raw_T)
    return torch.where(usable_T, bounded_T, 0.0), values_M


def logit_metrics_of(
    ratios: Ratios,
    entropy_T: Tensor,
    policy_loss_T: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
) -> Tensor:
    """The values of LOGIT_METRICS, float64 [M]; the KL is the estimate, not corrected."""
    ratio_T, log_ratio_T = ratios.ratio_T, ratios.log_ratio_T
    sums = [
        torch.ones_like(ratio_T),
        ratios.log_probs_T,
        entropy_T,
        ratio_T,
        ratio_T - 1.0 - log_ratio_T,
        *clips_of(ratios, settings),
        policy_loss_T,
        kl_of_gap(reference_gap_of(ratios.log_probs_T, rows), settings.kl_estimator),
    ]
    values = [torch.where(rows.mask_T, value, 0.0).sum(dtype=torch.float64) for value in sums]
    masked_T = torch.where(rows.mask_T, ratio_T, 0.0).double()
    values.append(masked_T.max() if masked_T.numel() else masked_T.sum())
    return torch.stack(values)
