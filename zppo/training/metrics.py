"""What the trainer measures in one step, under stable names; `metrics.jsonl` shows them as `train/<name>`.

All values are finite floats. Sums over tokens follow the rule of `zppo_kernels`: parts add up, so micro-batches do not
show. An update that was skipped as not finite gives nothing to `loss`, `grad_norm` and the ratio's numbers.

Shape legend: T response tokens of the window, S its rollouts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from zppo.metrics import Metric
from zppo.training.batch import Rollouts
from zppo_kernels import combine_metrics, summarise_metrics

TRAINER_METRICS: tuple[Metric, ...] = (
    Metric("loss", "", "Clipped surrogate loss, mean over the applied updates; 0 if there was none."),
    Metric("grad_norm", "", "Global L2 norm of the gradient before clipping, mean over the applied updates."),
    Metric("clip_low_share", "share", "Tokens whose ratio was cut at 1 - clip_low, among those with an advantage."),
    Metric("clip_high_share", "share", "Tokens whose ratio was cut at 1 + clip_high, among those with an advantage."),
    Metric("dual_clip_share", "share", "Tokens held by the dual clip, among those with an advantage."),
    Metric("approximate_kl", "nat", "KL(proximal || policy) a token, k3 estimate, over tokens with an advantage."),
    Metric("mismatch_kl", "nat", "KL(behaviour || proximal) a token, k3 estimate, over all tokens."),
    Metric("importance_weight_mean", "", "Mean of exp(proximal - behaviour) over all tokens, before truncation."),
    Metric("importance_weight_max", "", "The largest of them."),
    Metric("log_prob_gap_max", "nat", "Largest |proximal - behaviour| of a token."),
    Metric("entropy", "nat", "Mean entropy of the policy at the response tokens, at the start of the step."),
    Metric("positive_advantage_share", "share", "Rollouts with an advantage above 0."),
    Metric("live_rollout_share", "share", "Rollouts with an advantage other than 0; the others cost no pass."),
    Metric("staleness_mean", "versions", "Step minus sampling version, mean over tokens."),
    Metric("staleness_max", "versions", "The same, oldest token."),
    Metric("tokens_trained", "tokens", "Response tokens of the window; all of them count in the denominators."),
    Metric("response_length_mean", "tokens", "Mean response length."),
    Metric("accuracy_<kind>", "share", "Mean reward of the groups of this kind (plain, bcq, ncq)."),
    Metric("updates", "updates", "Optimizer updates applied; a mini-batch of trivial groups alone makes none."),
    Metric("updates_skipped", "updates", "Updates skipped because loss or gradient norm was not finite."),
    Metric("seconds_proximal", "s", "Time of the proximal pass."),
    Metric("seconds_update", "s", "Time of the updates."),
)


def window_metrics(rollouts: Rollouts, advantages_S: Tensor) -> dict[str, float]:
    """Numbers known without the model: rewards, advantages, lengths, staleness."""
    staleness_T = rollouts.staleness_T if rollouts.tokens else np.zeros(1)
    sequences = max(1, rollouts.sequences)
    return {
        "positive_advantage_share": float((advantages_S > 0).sum()) / sequences,
        "live_rollout_share": float((advantages_S != 0).sum()) / sequences,
        "staleness_mean": float(staleness_T.mean()),
        "staleness_max": float(staleness_T.max()),
        "tokens_trained": float(rollouts.tokens),
        "response_length_mean": rollouts.tokens / sequences,
        **_accuracies(rollouts),
    }


def _accuracies(rollouts: Rollouts) -> dict[str, float]:
    rewards: dict[str, list[np.ndarray]] = {}
    for group in rollouts.groups:
        rewards.setdefault(group.kind, []).append(group.rewards)
    return {f"accuracy_{kind}": float(np.concatenate(parts).mean()) for kind, parts in sorted(rewards.items())}


def proximal_metrics(proximal_T: Tensor, behaviour_T: Tensor, entropy_T: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs are from the engine's, and the entropy."""
    if not len(proximal_T):
        return {}
    gap_T = (proximal_T - behaviour_T).double()
    # exp(80) is beyond anything that still means something, and finite.
    weight_T = gap_T.clamp(max=80.0).exp()
    values = torch.stack(
        [(weight_T - 1 - gap_T).mean(), weight_T.mean(), weight_T.max(), gap_T.abs().max(), entropy_T.double().mean()]
    ).tolist()
    names = ("mismatch_kl", "importance_weight_mean", "importance_weight_max", "log_prob_gap_max", "entropy")
    return dict(zip(names, values, strict=True))


def update_metrics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares and means of the ratio from the sums that the loss returned for each micro-batch."""
    summary = summarise_metrics(combine_metrics(parts))
    names = ("clip_low_share", "clip_high_share", "dual_clip_share", "approximate_kl")
    return {name: summary.get(name, 0.0) for name in names}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what is not finite (a broken model); its absence shows in the records, and no message is refused."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
