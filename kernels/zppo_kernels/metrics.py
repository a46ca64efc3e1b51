"""Loss metrics as sums, counts and maxima, so that they add over chunks, micro-batches and ranks.

Invariant: a metric whose name ends in `_max` combines by maximum, every other one by addition. The
two tuples below are the order in which the kernels write their partial results.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Known without the logits: taken over all unmasked rows, rows with zero advantage included.
SAMPLE_METRICS: tuple[str, ...] = (
    "token_count",  # unmasked rows
    "live_token_count",  # unmasked rows with a gradient: an advantage, a KL or entropy term
    "positive_advantage_count",
    "importance_weight_count",  # rows with a usable behaviour log-prob
    "importance_weight_sum",  # raw exp(proximal - behaviour), before truncation
    "importance_capped_count",  # raw weight outside cap and floor: truncated or masked
    "behaviour_dropped_count",
    # behaviour log-prob not finite: the token leaves the loss when a correction is on
    "mismatch_kl_sum",  # w - 1 - log w of the raw weight, an estimate of KL(behaviour || proximal)
    "importance_weight_max",
)
COUNTED_EARLY = 3
"""How many of them need no log-prob. The others are of the rows whose logits were computed, where
the ratio is exactly 1."""
# Known only from the logits: taken over the rows whose logits were computed (`evaluated_count` of
# them).
LOGIT_METRICS: tuple[str, ...] = (
    "evaluated_count",
    "log_prob_sum",
    "entropy_sum",
    "ratio_sum",
    "approximate_kl_sum",  # r - 1 - log r, an estimate of KL(proximal || policy)
    "clip_low_count",
    "clip_high_count",
    "dual_clip_count",
    "policy_loss_sum",  # corrected surrogate before normalisation, without the KL term
    "reference_kl_sum",
    "ratio_max",
)
POLICY_METRICS: tuple[str, ...] = SAMPLE_METRICS + LOGIT_METRICS
JSD_METRICS: tuple[str, ...] = ("token_count", "jsd_sum", "student_entropy_sum")


def named(names: tuple[str, ...], values_M: Tensor) -> dict[str, Tensor]:
    """The vector of M metric values as a dict of 0-dim float64 views."""
    return dict(zip(names, values_M.unbind(0), strict=True))


def reduce_partials(names: tuple[str, ...], partials_PM: Tensor) -> Tensor:
    """Partial results of P rows, programs or chunks -> one float64 vector [M]."""
    values_M = partials_PM.sum(0, dtype=torch.float64)
    for column, name in enumerate(names):
        if name.endswith("_max") and len(partials_PM):
            values_M[column] = partials_PM[:, column].max()
    return values_M


def combine_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of several chunks, micro-batches or ranks -> metrics of all of them; an empty
    iterable gives {}."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif name.endswith("_max"):
                total[name] = torch.maximum(total[name], value)
            else:
                total[name] = total[name] + value
    return total


# mean or share -> (numerator, denominator)
_MEANS: dict[str, tuple[str, str]] = {
    "live_token_share": ("live_token_count", "token_count"),
    "positive_advantage_share": ("positive_advantage_count", "token_count"),
    "importance_weight_mean": ("importance_weight_sum", "importance_weight_count"),
    "importance_capped_share": ("importance_capped_count", "importance_weight_count"),
    "mismatch_kl": ("mismatch_kl_sum", "importance_weight_count"),
    "entropy": ("entropy_sum", "evaluated_count"),
    "ratio_mean": ("ratio_sum", "evaluated_count"),
    "approximate_kl": ("approximate_kl_sum", "evaluated_count"),
    "clip_low_share": ("clip_low_count", "token_count"),
    "clip_high_share": ("clip_high_count", "token_count"),
    "dual_clip_share": ("dual_clip_count", "token_count"),
    "reference_kl": ("reference_kl_sum", "evaluated_count"),
    "jsd": ("jsd_sum", "token_count"),
    "student_entropy": ("student_entropy_sum", "token_count"),
}


def summarise_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means, shares and maxima for people. Reads the device (a synchronisation): call it once per
    step, not per chunk.
    """
    values = {name: float(value) for name, value in metrics.items()}
    summary = {name: value for name, value in values.items() if name.endswith("_max")}
    for mean, (numerator, denominator) in _MEANS.items():
        if numerator in values and denominator in values:
            summary[mean] = values[numerator] / values[denominator] if values[denominator] else 0.0
    return summary
