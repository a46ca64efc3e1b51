"""One training step, in the order of Algorithm 1, step 6.

Invariants: each rollout token is used in exactly one update, or in none if it is masked. An update
whose loss or gradient norm is not finite is skipped whole: neither weights nor optimizer state see
it. Given weights, optimizer state, seed and window, the step is a pure function; it draws nothing
from global generators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from zppo.algorithm.methods.base import Loss
from zppo.training import metrics
from zppo.training.batch import Rollouts, assemble, mini_batches
from zppo.training.distillation import Divergence
from zppo.training.surrogate import PolicyLoss
from zppo.training.trainer import Counts, Objective, StepSettings, Trainer
from zppo_protocol.messages import TrainWindow

OBJECTIVES: dict[Loss, Callable[[Trainer, Rollouts, list[np.ndarray]], Objective]] = {
    "clipped_surrogate": PolicyLoss,
    "jsd": Divergence,
}


@dataclass
class Tally:
    """What the updates of one step add up to."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: int = 0

    def metrics(self) -> dict[str, float]:
        applied = len(self.losses)
        return {
            "loss": sum(self.losses) / max(1, applied),
            "grad_norm": sum(self.norms) / max(1, applied),
            "updates": float(applied),
            "updates_skipped": float(self.skipped),
        }


def train_step(trainer: Trainer, window: TrainWindow) -> dict[str, float]:
    """Train the policy on one window and return the metrics of
    `zppo.training.metrics.TRAINER_METRICS`.

    The first update runs under the weights that the step starts from, so it is its own proximal
    pass; the rollouts of the others are read before it.

    Raises StalenessError if the window holds a token older than the bound, before anything is
    changed.
    """
    settings = trainer.settings
    rollouts = assemble(
        window,
        max_staleness=settings.max_staleness,
        device=trainer.policy.device,
        reach=trainer.reach,
        mask_truncated=settings.method.truncated == "mask",
        look=trainer.look,
    )
    batches = split(rollouts, settings)
    objective = OBJECTIVES[settings.objective](trainer, rollouts, batches)
    # What is masked has had its part in baselines and scales; from here on it is as good as absent.
    batches = [sequences[~rollouts.masked_S[sequences]] for sequences in batches]
    batches = [sequences for sequences in batches if len(objective.live(sequences))]
    objective.prepare(first=objective.live(batches[0]) if batches else np.zeros(0, np.int64))
    begin, tally = trainer.clock(), Tally()
    for number, sequences in enumerate(batches):
        update(trainer, rollouts, sequences, objective, tally, first=number == 0)
    return metrics.finite(
        metrics.window_metrics(rollouts)
        | objective.metrics(tally.parts)
        | tally.metrics()
        | {"seconds_update": trainer.clock() - begin}
    )


def split(rollouts: Rollouts, settings: StepSettings) -> list[np.ndarray]:
    """The rollouts of each of the I mini-batches, as indices; a group is never cut."""
    groups = mini_batches(
        len(rollouts.groups),
        settings.method.updates_per_step,
        seed=settings.seed,
        step=rollouts.step,
    )
    return [np.flatnonzero(np.isin(rollouts.group_S, chosen)) for chosen in groups]


def update(
    trainer: Trainer,
    rollouts: Rollouts,
    sequences: np.ndarray,
    objective: Objective,
    tally: Tally,
    *,
    first: bool,
) -> None:
    """One optimizer update on one mini-batch: sum gradients over its micro-batches, check, clip,
    step."""
    trainer.gradients.clear()
    dealt = trainer.deal(rollouts, objective.live(sequences))
    counts = Counts(int(rollouts.lengths_S[sequences].sum()), len(sequences), dealt.total)
    loss, parts = torch.zeros((), device=rollouts.device), []
    for batch in dealt.batches:
        work = partial(objective.loss, batch, counts, first=first)
        part_loss, part_metrics = trainer.policy.within(work)
        part_loss = part_loss * batch.weight
        part_loss.backward()
        loss += part_loss.detach()
        parts.append(part_metrics)
        trainer.tick()
    loss, norm = trainer.ranks.sum(loss), trainer.gradients.norm()
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        tally.skipped += 1
        return
    trainer.gradients.clip(norm, trainer.settings.gradient_clip)
    trainer.optimizer.step(trainer.gradients.tensors())
    parts = trainer.ranks.metrics(parts, [batch.weight for batch in dealt.batches])
    objective.applied(parts)
    tally.losses.append(float(loss))
    tally.norms.append(float(norm))
    tally.parts += parts
