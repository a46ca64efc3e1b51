"""The policy loss of the RL methods (Algorithm 1, step 6; Eqs. 2-3), as the topology has it.

A rollout with advantage 0 has no gradient unless the loss has a KL or an entropy term, so without
them it takes part in no forward or backward pass of the updates; its tokens still count in the
denominator. The proximal pass covers some of them for the measurements alone, as
`actors.trainer.measured_rollouts` says (`zppo.training.measuring`), in passes of their own: what is
measured changes no bit of what is trained.

The first update runs under the proximal weights themselves: its ratio is exactly 1, and its own
log-probs are the proximal ones.

Shape legend: T response tokens of the window, S its rollouts, K parts of a reward; R response
tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from zppo.config.method import MethodConfig
from zppo.training import metrics
from zppo.training.batch import Rollouts
from zppo.training.entropy import applied_coefficient, moved
from zppo.training.layout import MicroBatch
from zppo.training.loss_settings import old_log_probs
from zppo.training.measuring import measuring_weights
from zppo.training.policy import Outputs, Policy
from zppo.training.trainer import Counts, Trainer
from zppo_kernels import (
    PolicyLossOutput,
    PolicyLossSettings,
    advantage_statistics,
    decoupled_advantages,
    group_advantages,
)


class PolicyLoss:
    """An `Objective`. `proximal_T` and `entropy_T` are filled by `prepare`, and by `loss` for the
    rollouts of the first update: those in this rank's micro-batches, which `_kept_T` marks, until
    `metrics` joins them."""

    def __init__(self, trainer: Trainer, rollouts: Rollouts, batches: list[np.ndarray]) -> None:
        settings, method = trainer.settings, trainer.settings.method
        self._trainer, self._rollouts, self._batches = trainer, rollouts, batches
        self._advantages_S = step_advantages(rollouts, batches, method, settings.reward_weights)
        self._all_live = method.kl_coefficient > 0 or method.entropy_coefficient > 0
        self._selects = method.entropy_quantile < 1.0
        self._trained = self.live(np.arange(rollouts.sequences))
        self._weights_S = measuring_weights(
            rollouts,
            np.isin(np.arange(rollouts.sequences), self._trained),
            "all" if self._selects else settings.measured_rollouts,
            seed=settings.seed,
        )
        self._sampled = not bool(rollouts.frozen_T.any())
        self.proximal_T = self.entropy_T = torch.zeros_like(rollouts.behaviour_T)
        self._kept_T = torch.zeros_like(rollouts.frozen_T)
        self._advantages_T: Tensor | None = None
        self._reference_T: Tensor | None = None
        self._seconds_proximal = 0.0

    def live(self, sequences: np.ndarray) -> np.ndarray:
        rollouts = self._rollouts
        present_S = (rollouts.lengths_S > 0) & ~rollouts.masked_S
        if not self._all_live:
            present_S &= self._advantages_S.numpy() != 0
        return sequences[present_S[sequences]]

    def prepare(self, first: np.ndarray) -> None:
        begin, trainer, rollouts = self._trainer.clock(), self._trainer, self._rollouts
        early = self._trained if self._selects else np.setdiff1d(self._trained, first)
        measured = np.setdiff1d(np.flatnonzero(self._weights_S), self._trained)
        self.proximal_T, self.entropy_T = log_prob_pass(
            trainer, trainer.policy, rollouts, early, measured
        )
        if trainer.reference is not None:
            self._reference_T, _ = log_prob_pass(
                trainer, trainer.reference, rollouts, self._trained
            )
        if self._selects:
            self._advantages_T = self._selected_advantages()
        self._seconds_proximal = trainer.clock() - begin

    def loss(
        self, batch: MicroBatch, counts: Counts, *, first: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        policy, tokens_R = self._trainer.policy, batch.tokens_R
        outputs = policy.outputs(batch)
        own = first and self._sampled
        if first and not own and not self._selects:
            self._keep(batch, *policy.log_probs_of(
                outputs, self._rollouts.token_ids_T[tokens_R],
                temperature=self._trainer.settings.loss.temperature,
                support_ids_TK=batch.support_RK,
            ))  # fmt: skip
        output = self._loss_of(outputs, batch, counts, own=own)
        if own and not self._selects:
            self._keep(batch, output.log_probs_T, output.entropy_T)
        return output.loss, output.metrics

    def applied(self, parts: list[dict[str, Tensor]]) -> None:
        trainer = self._trainer
        if trainer.entropy is not None and parts:
            entropy = metrics.entropy_of(parts)
            trainer.entropy = moved(trainer.settings.method, trainer.entropy, entropy)

    def metrics(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        ranks = self._trainer.ranks
        proximal_T = ranks.joined(self.proximal_T, self._kept_T)
        entropy_T = ranks.joined(self.entropy_T, self._kept_T)
        return (
            metrics.proximal_metrics(self._rollouts, self._weights_S, proximal_T, entropy_T)
            | {"seconds_proximal": self._seconds_proximal}
            | metrics.advantage_metrics(self._advantages_S)
            | metrics.update_metrics(parts)
            | metrics.regulariser_metrics(self._trainer, parts)
        )

    def _loss_of(
        self, outputs: Outputs, batch: MicroBatch, counts: Counts, *, own: bool
    ) -> PolicyLossOutput:
        """`own`: policy and proximal are the same weights, and a policy sampled every token."""
        rollouts, settings, tokens_R = self._rollouts, self._trainer.settings, batch.tokens_R
        per_pass = settings.method.loss_normalisation == "micro_batch"
        old_R, behaviour_R = old_log_probs(
            settings.method,
            None if own else self.proximal_T[tokens_R],
            rollouts.behaviour_T[tokens_R],
            rollouts.frozen_T[tokens_R],
        )
        return self._trainer.policy.policy_loss_of(
            outputs,
            rollouts.token_ids_T[tokens_R],
            sequence_ids_T=batch.sequence_ids_R,
            **self._advantages_of(batch),
            proximal_log_probs_T=old_R,
            behaviour_log_probs_T=behaviour_R,
            reference_log_probs_T=None
            if self._reference_T is None
            else self._reference_T[tokens_R],
            support_ids_TK=batch.support_RK,
            token_count=counts.micro_batches * len(tokens_R) if per_pass else counts.tokens,
            sequence_count=counts.sequences,
            settings=self._loss_settings(),
            full_metrics=self._trainer.entropy is not None,
        )

    def _loss_settings(self) -> PolicyLossSettings:
        """With the entropy coefficient as it stands."""
        settings, state = self._trainer.settings, self._trainer.entropy
        if state is None:
            return settings.loss
        coefficient = applied_coefficient(settings.method, state)
        return replace(settings.loss, entropy_coefficient=coefficient)

    def _advantages_of(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Of the sequences, or of the tokens where only some of them keep a gradient."""
        if self._advantages_T is not None:
            return {"advantages_T": self._advantages_T[batch.tokens_R]}
        return {"advantages_S": self._advantages_S.to(self._rollouts.device)[batch.sequences_S]}

    def _selected_advantages(self) -> Tensor:
        """Advantages [T], 0 for all but the tokens of highest entropy of each mini-batch
        (Wang et al. 2025; TRL `top_entropy_quantile`). The denominators count them all."""
        rollouts, device = self._rollouts, self._rollouts.device
        quantile = 1.0 - self._trainer.settings.method.entropy_quantile
        entropy_T = self.entropy_T.double().cpu().numpy()
        kept_T = np.zeros(rollouts.tokens, np.bool_)
        for sequences in self._batches:
            present_S = np.zeros(rollouts.sequences, np.bool_)
            present_S[sequences] = ~rollouts.masked_S[sequences]
            present_T = np.repeat(present_S, rollouts.lengths_S)
            if present_T.any():
                kept_T |= present_T & (entropy_T >= np.quantile(entropy_T[present_T], quantile))
        lengths_S = torch.from_numpy(rollouts.lengths_S)
        advantages_T = self._advantages_S.repeat_interleave(lengths_S)
        return advantages_T.masked_fill_(torch.from_numpy(~kept_T), 0.0).to(device)

    def _keep(self, batch: MicroBatch, log_probs_R: Tensor, entropy_R: Tensor) -> None:
        self.proximal_T[batch.tokens_R] = log_probs_R
        self.entropy_T[batch.tokens_R] = entropy_R
        if batch.weight:
            self._kept_T[batch.tokens_R] = True


def log_prob_pass(
    trainer: Trainer, policy: Policy, rollouts: Rollouts, *parts: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of these rollouts' tokens under the present weights of `policy`,
    float32 [T] each, elsewhere 0. No rollout of one part lies in a pass with one of another."""
    log_probs_T, entropy_T = (
        torch.zeros_like(rollouts.behaviour_T),
        torch.zeros_like(rollouts.behaviour_T),
    )
    temperature, read_T = trainer.settings.loss.temperature, torch.zeros_like(rollouts.frozen_T)
    for batch in chain.from_iterable(trainer.micro_batches(rollouts, part) for part in parts):
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        found = policy.log_probs(batch, targets_R, temperature=temperature)
        if batch.weight:
            log_probs_T[batch.tokens_R], entropy_T[batch.tokens_R] = found
            read_T[batch.tokens_R] = True
        trainer.tick()
    ranks = trainer.ranks
    return ranks.joined(log_probs_T, read_T), ranks.joined(entropy_T, read_T)


def step_advantages(
    rollouts: Rollouts,
    batches: list[np.ndarray],
    method: MethodConfig,
    weights: tuple[float, ...] = (),
) -> Tensor:
    """Advantages of all rollouts (Eqs. 2-3), float32 [S]; normalised over each mini-batch, or over
    the whole step. `weights` [K] of the parts of the reward, where they are normalised apart.

    A masked rollout gets 0 in the end, so that it has no loss, but its reward counts in the
    baseline and the scale.
    """
    if method.advantage_rewards == "decoupled":
        advantages_S = _decoupled(rollouts, batches, method, weights)
    else:
        advantages_S = _summed(rollouts, batches, method)
    return advantages_S.masked_fill_(torch.from_numpy(rollouts.masked_S), 0.0)


def _summed(rollouts: Rollouts, batches: list[np.ndarray], method: MethodConfig) -> Tensor:
    groups_S = torch.from_numpy(rollouts.group_S)
    shared = None
    if method.advantage_scope == "step" and rollouts.sequences:
        shared = advantage_statistics(rollouts.rewards_S, groups_S, mode=method.advantage)
    advantages_S = torch.zeros_like(rollouts.rewards_S)
    for sequences in batches:
        advantages_S[sequences] = group_advantages(
            rollouts.rewards_S[sequences],
            _local_groups(rollouts, sequences),
            mode=method.advantage,
            statistics=shared,
        )
    return advantages_S


def _decoupled(
    rollouts: Rollouts, batches: list[np.ndarray], method: MethodConfig, weights: tuple[float, ...]
) -> Tensor:
    if method.advantage_scope == "step":
        batches = [np.arange(rollouts.sequences)]
    advantages_S, parts_SK = torch.zeros_like(rollouts.rewards_S), rollouts.reward_parts_SK
    # The last column is the reward of questions with a rule of their own, and counts as it is.
    of_parts = weights if parts_SK.shape[1] > 1 else ()
    weights_K = torch.tensor((*of_parts, 1.0), dtype=torch.float64)
    for sequences in batches:
        advantages_S[sequences] = decoupled_advantages(
            parts_SK[sequences],
            weights_K,
            _local_groups(rollouts, sequences),
            mode=method.advantage,
        )
    return advantages_S


def _local_groups(rollouts: Rollouts, sequences: np.ndarray) -> Tensor:
    """The group of each of these rollouts, counted from 0."""
    return torch.from_numpy(np.unique(rollouts.group_S[sequences], return_inverse=True)[1])
