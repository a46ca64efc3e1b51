"""The clipped surrogate of the RL methods (Algorithm 1, step 6; Eqs. 2-3).

A rollout with advantage 0 has no gradient (the loss has no KL term), so it takes part in no forward
or backward pass of the updates; its tokens still count in the denominator. The proximal pass covers
it for the measurements alone, unless `actors.trainer.measured_rollouts` is `trained`.

Shape legend: T response tokens of the window, S its rollouts; R response tokens of a micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zppo.config.method import MethodConfig
from zppo.training import metrics
from zppo.training.batch import Rollouts
from zppo.training.layout import MicroBatch
from zppo.training.loss_settings import old_log_probs
from zppo.training.trainer import Trainer
from zppo_kernels import advantage_statistics, group_advantages


class ClippedSurrogate:
    """An `Objective`. `proximal_T` and `entropy_T` are filled by `prepare`, and by `loss` for the
    rollouts of the first update."""

    def __init__(self, trainer: Trainer, rollouts: Rollouts, batches: list[np.ndarray]) -> None:
        self._trainer = trainer
        self._rollouts = rollouts
        self._advantages_S = step_advantages(rollouts, batches, trainer.settings.method)
        everyone = np.arange(rollouts.sequences)
        self._measured = (
            everyone if trainer.settings.measured_rollouts == "all" else self.live(everyone)
        )
        self.proximal_T = self.entropy_T = torch.zeros_like(rollouts.behaviour_T)
        self._seconds_proximal = 0.0

    def live(self, sequences: np.ndarray) -> np.ndarray:
        advantages_S, lengths_S = (
            self._advantages_S[sequences].numpy(),
            self._rollouts.lengths_S[sequences],
        )
        return sequences[(advantages_S != 0) & (lengths_S > 0)]

    def prepare(self, first: np.ndarray) -> None:
        begin = self._trainer.clock()
        self.proximal_T, self.entropy_T = proximal_pass(
            self._trainer, self._rollouts, np.setdiff1d(self._measured, first)
        )
        self._seconds_proximal = self._trainer.clock() - begin

    def loss(
        self, batch: MicroBatch, token_count: int, sequence_count: int, *, first: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rollouts, settings, tokens_R = self._rollouts, self._trainer.settings, batch.tokens_R
        policy, targets_R = self._trainer.policy, rollouts.token_ids_T[tokens_R]
        outputs = policy.outputs(batch)
        if first:
            self.proximal_T[tokens_R], self.entropy_T[tokens_R] = policy.log_probs_of(
                outputs,
                targets_R,
                temperature=settings.loss.temperature,
                support_ids_TK=batch.support_RK,
            )
        old_R, behaviour_R = old_log_probs(
            settings.method,
            self.proximal_T[tokens_R],
            rollouts.behaviour_T[tokens_R],
            rollouts.frozen_T[tokens_R],
        )
        output = policy.policy_loss_of(
            outputs,
            targets_R,
            sequence_ids_T=batch.sequence_ids_R,
            advantages_S=self._advantages_S.to(rollouts.device)[batch.sequences_S],
            proximal_log_probs_T=old_R,
            behaviour_log_probs_T=behaviour_R,
            support_ids_TK=batch.support_RK,
            token_count=token_count,
            sequence_count=sequence_count,
            settings=settings.loss,
        )
        return output.loss, output.metrics

    def metrics(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        return (
            metrics.proximal_metrics(
                self._rollouts, self._measured, self.proximal_T, self.entropy_T
            )
            | {"seconds_proximal": self._seconds_proximal}
            | metrics.advantage_metrics(self._advantages_S)
            | metrics.update_metrics(parts)
        )


def proximal_pass(
    trainer: Trainer, rollouts: Rollouts, sequences: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of these rollouts' tokens under the present weights, float32 [T]
    each, elsewhere 0."""
    proximal_T, entropy_T = (
        torch.zeros_like(rollouts.behaviour_T),
        torch.zeros_like(rollouts.behaviour_T),
    )
    temperature = trainer.settings.loss.temperature
    for batch in trainer.micro_batches(rollouts, sequences):
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        proximal_T[batch.tokens_R], entropy_T[batch.tokens_R] = trainer.policy.log_probs(
            batch, targets_R, temperature=temperature
        )
        trainer.tick()
    return proximal_T, entropy_T


def step_advantages(rollouts: Rollouts, batches: list[np.ndarray], method: MethodConfig) -> Tensor:
    """Advantages of all rollouts (Eqs. 2-3), float32 [S]; normalised over each mini-batch, or over
    the whole step.

    A masked rollout gets 0 in the end, so that it has no loss, but its reward counts in the
    baseline and the scale.
    """
    groups_S = torch.from_numpy(rollouts.group_S)
    shared = None
    if method.advantage_scope == "step" and rollouts.sequences:
        shared = advantage_statistics(rollouts.rewards_S, groups_S, mode=method.advantage)
    advantages_S = torch.zeros_like(rollouts.rewards_S)
    for sequences in batches:
        local = np.unique(rollouts.group_S[sequences], return_inverse=True)[1]
        advantages_S[sequences] = group_advantages(
            rollouts.rewards_S[sequences],
            torch.from_numpy(local),
            mode=method.advantage,
            statistics=shared,
        )
    return advantages_S.masked_fill_(torch.from_numpy(rollouts.masked_S), 0.0)
