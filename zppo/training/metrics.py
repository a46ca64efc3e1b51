"""What the trainer measures in one step, under stable names; `metrics.jsonl` shows them as
`train/<name>`.

All values are finite floats; what a method does not measure has no key. Sums over tokens follow the
rule of `zppo_kernels`: parts add up, so micro-batches do not show. An update that was skipped as
not finite gives nothing to `loss`, `grad_norm`, `jsd` and the ratio's numbers.

Shape legend: T response tokens of the window, S its rollouts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from zppo.records.metrics import Metric
from zppo.training.batch import Rollouts
from zppo.training.trainer import Trainer
from zppo_kernels import combine_metrics, summarise_metrics

TRAINER_METRICS: tuple[Metric, ...] = (
    Metric(
        "loss",
        "",
        "Policy loss or divergence, mean over the applied updates; 0 if there was none.",
    ),
    Metric(
        "grad_norm",
        "",
        "Global L2 norm of the gradient before clipping, mean over the applied updates; 0 if there "
        "was none.",
    ),
    Metric(
        "clip_low_share",
        "share",
        "Tokens at the lower bound (clip: ratio cut at 1 - clip_low), of those the updates read.",
    ),
    Metric(
        "clip_high_share",
        "share",
        "Tokens at the upper bound (clip: ratio cut at 1 + clip_high), of those the updates read.",
    ),
    Metric("dual_clip_share", "share", "Tokens held by the dual clip, of those the updates read."),
    Metric(
        "approximate_kl",
        "nat",
        "KL(proximal || policy) a token, k3 estimate, over tokens with a gradient.",
    ),
    Metric(
        "mismatch_kl",
        "nat",
        "KL(behaviour || proximal) a token, k3 estimate, over the tokens a policy sampled.",
    ),
    Metric(
        "importance_weight_mean",
        "",
        "Mean of exp(proximal - behaviour) over these tokens, before truncation.",
    ),
    Metric("importance_weight_max", "", "The largest of those that were read."),
    Metric("log_prob_gap_max", "nat", "Largest |proximal - behaviour| of a token that was read."),
    Metric(
        "entropy",
        "nat",
        "Mean entropy of the policy (over its support) at the response tokens, at the start.",
    ),
    Metric(
        "jsd", "nat", "Distillation: divergence from the teacher a token, over the applied updates."
    ),
    Metric(
        "entropy_coefficient",
        "",
        "With an entropy bonus: its coefficient after the step's updates.",
    ),
    Metric(
        "reference_kl",
        "nat",
        "With method.kl_coefficient: KL(policy || reference) a token, by method.kl_estimator.",
    ),
    Metric("positive_advantage_share", "share", "Rollouts with an advantage above 0."),
    Metric(
        "live_rollout_share",
        "share",
        "Rollouts with an advantage, and not masked; the others cost no pass, but for a KL or "
        "entropy bonus.",
    ),
    Metric(
        "staleness_mean",
        "versions",
        "Step minus sampling version, mean over tokens; a teacher's count 0.",
    ),
    Metric("staleness_max", "versions", "The same, oldest token."),
    Metric(
        "tokens_trained",
        "tokens",
        "Response tokens of the groups in the loss; all but masked ones count in the denominators.",
    ),
    Metric(
        "unreadable_rollouts",
        "rollouts",
        "Left out: a token id that the model lacks, or longer than its context (a teacher's).",
    ),
    Metric("response_length_mean", "tokens", "Mean response length."),
    Metric("accuracy_<kind>", "share", "Mean reward of the groups of this kind (plain, bcq, ncq)."),
    Metric(
        "updates",
        "updates",
        "Optimizer updates applied; a mini-batch of trivial groups alone makes none.",
    ),
    Metric(
        "updates_skipped",
        "updates",
        "Updates skipped because loss or gradient norm was not finite.",
    ),
    Metric(
        "seconds_proximal",
        "s",
        "Time of the passes before the updates: proximal, without the first update's rollouts, and "
        "reference.",
    ),
    Metric("seconds_update", "s", "Time of the updates."),
)


def window_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Numbers known without the model: rewards, lengths, staleness. A window without tokens has no
    staleness, one without rollouts no mean length."""
    found = {
        "tokens_trained": float(rollouts.tokens),
        "unreadable_rollouts": float(rollouts.unreadable),
        **_accuracies(rollouts),
    }
    if rollouts.tokens:
        found["staleness_mean"] = float(rollouts.staleness_T.mean())
        found["staleness_max"] = float(rollouts.staleness_T.max())
    if rollouts.sequences:
        found["response_length_mean"] = rollouts.tokens / rollouts.sequences
    return found


def advantage_metrics(advantages_S: Tensor) -> dict[str, float]:
    """How many rollouts have something to say; 0 where none is left, which advice goes by."""
    sequences = max(1, len(advantages_S))
    return {
        "positive_advantage_share": float((advantages_S > 0).sum()) / sequences,
        "live_rollout_share": float((advantages_S != 0).sum()) / sequences,
    }


def _accuracies(rollouts: Rollouts) -> dict[str, float]:
    rewards: dict[str, list[np.ndarray]] = {}
    for group in rollouts.groups:
        rewards.setdefault(group.kind, []).append(group.rewards)
    return {
        f"accuracy_{kind}": float(np.concatenate(parts).mean())
        for kind, parts in sorted(rewards.items())
    }


def proximal_metrics(
    rollouts: Rollouts, weights_S: np.ndarray, proximal_T: Tensor, entropy_T: Tensor
) -> dict[str, float]:
    """The entropy of the policy, and how far the trainer's log-probs are from the engine's on what
    it sampled. A token counts with the weight [S] of its rollout; those of weight 0 were not
    read."""
    counts_T = torch.from_numpy(np.repeat(weights_S, rollouts.lengths_S)).to(rollouts.device)
    read_T = counts_T > 0
    if not bool(read_T.any()):
        return {}
    entropy = {"entropy": float(_mean(entropy_T[read_T].double(), counts_T[read_T]))}
    sampled_T = read_T & ~rollouts.frozen_T
    if not bool(sampled_T.any()):
        return entropy
    gap_T, counts_T = (proximal_T - rollouts.behaviour_T)[sampled_T].double(), counts_T[sampled_T]
    # exp(80) is beyond anything that still means something, and finite.
    weight_T = gap_T.clamp(max=80.0).exp()
    values = torch.stack(
        [
            _mean(weight_T - 1 - gap_T, counts_T),
            _mean(weight_T, counts_T),
            weight_T.max(),
            gap_T.abs().max(),
        ]
    ).tolist()
    names = ("mismatch_kl", "importance_weight_mean", "importance_weight_max", "log_prob_gap_max")
    return entropy | dict(zip(names, values, strict=True))


def _mean(values_T: Tensor, counts_T: Tensor) -> Tensor:
    return (values_T * counts_T).sum() / counts_T.sum()


def update_metrics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares and means of the ratio from the sums that the loss returned for each micro-batch;
    nothing without an update."""
    summary = summarise_metrics(combine_metrics(parts))
    names = ("clip_low_share", "clip_high_share", "dual_clip_share", "approximate_kl")
    return {name: summary[name] for name in names if name in summary}


def regulariser_metrics(trainer: Trainer, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """What the entropy and KL terms are at, where the loss has them."""
    method, found = trainer.settings.method, {}
    if method.entropy_coefficient > 0:
        state = trainer.entropy
        found["entropy_coefficient"] = (
            method.entropy_coefficient if state is None else state.coefficient
        )
    if method.kl_coefficient > 0 and parts:
        found["reference_kl"] = summarise_metrics(combine_metrics(parts))["reference_kl"]
    return found


def entropy_of(parts: list[dict[str, Tensor]]) -> float:
    """Mean entropy of the tokens of one update."""
    return summarise_metrics(combine_metrics(parts))["entropy"]


def divergence_metrics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Divergence and entropy a token; the passes of the updates see the policy, so there is no pass
    for the entropy."""
    summary = summarise_metrics(combine_metrics(parts))
    return {"jsd": summary["jsd"], "entropy": summary["student_entropy"]} if parts else {}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what is not finite (a broken model); its absence shows in the records, and no
    message is refused."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
