"""Distillation (Algorithms 2 and 3): the divergence of the student from the teacher at every
response token.

It does not matter who wrote the tokens, so there are no advantages, no ratio and no proximal pass.
A colocated teacher reads the same micro-batches and gives its whole distribution; of a remote one
the window brings the K most probable tokens, and what they leave of 1 is one more category.

Shape legend: T response tokens of the window, R of a micro-batch, K most probable tokens of the
teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zppo.training import metrics
from zppo.training.batch import Rollouts
from zppo.training.layout import MicroBatch
from zppo.training.trainer import Counts, Trainer
from zppo_kernels import JsdLossOutput
from zppo_protocol.samples import TokenScores, TrainGroup

UNKNOWN = -1
"""The id of a teacher token that is not there, or that the student does not have; its mass belongs
to the tail."""


class Divergence:
    """An `Objective`: the generalised Jensen-Shannon divergence, summed over the tokens and divided
    by their number."""

    def __init__(self, trainer: Trainer, rollouts: Rollouts, batches: list[np.ndarray]) -> None:
        self._trainer = trainer
        self._rollouts = rollouts
        self._support = (
            support_of(rollouts, trainer.policy.vocabulary, trainer.policy.unsampled)
            if trainer.teacher is None and rollouts.tokens
            else None
        )

    def live(self, sequences: np.ndarray) -> np.ndarray:
        return sequences[self._rollouts.lengths_S[sequences] > 0]

    def prepare(self, first: np.ndarray) -> None:
        """Nothing: the loss asks for no other weights than the present ones."""

    def applied(self, parts: list[dict[str, Tensor]]) -> None:
        """Nothing: no setting of a distillation moves with its updates."""

    def loss(
        self, batch: MicroBatch, counts: Counts, *, first: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self._trainer.settings
        output = self._divergence(
            batch,
            token_count=counts.tokens,
            beta=settings.method.jsd_beta,
            temperature=settings.loss.temperature,
        )
        return output.loss, output.metrics

    def metrics(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        return metrics.divergence_metrics(parts)

    def _divergence(self, batch: MicroBatch, **arguments: Any) -> JsdLossOutput:
        trainer = self._trainer
        if trainer.teacher is not None:
            return trainer.policy.jsd_loss(batch, trainer.teacher, **arguments)
        assert self._support is not None
        ids_TK, log_probs_TK = self._support
        return trainer.policy.jsd_loss_top_k(
            batch, ids_TK[batch.tokens_R], log_probs_TK[batch.tokens_R], **arguments
        )


def support_of(
    rollouts: Rollouts, vocabulary: int, unsampled: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The remote teacher's tokens [T, K] int64 and their log-probs [T, K] float32, on the device of
    the rollouts.

    K is that of the widest group; groups without tokens need no scores. Raises RuntimeError for any
    other group that has none: the window should not have come.
    """
    scores = [_scores(group) for group in rollouts.groups if len(group.samples.token_ids)]
    width = max(1, *(score.token_ids.shape[1] for score in scores))
    ids_TK = np.concatenate([_widened(score.token_ids, width, UNKNOWN) for score in scores]).astype(
        np.int64
    )
    ids_TK[(ids_TK >= vocabulary) | np.isin(ids_TK, unsampled)] = UNKNOWN
    log_probs_TK = np.concatenate([_widened(score.log_probs, width, 0.0) for score in scores])
    return torch.from_numpy(ids_TK).to(rollouts.device), torch.from_numpy(log_probs_TK).to(
        rollouts.device
    )


def _scores(group: TrainGroup) -> TokenScores:
    if group.scores is None:
        raise RuntimeError(
            f"group {group.group_id!r} came for distillation without the scores of a remote teacher"
        )
    return group.scores


def _widened(values_TK: np.ndarray, width: int, filling: float) -> np.ndarray:
    return np.pad(values_TK, ((0, 0), (0, width - values_TK.shape[1])), constant_values=filling)
