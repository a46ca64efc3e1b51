"""One training step, in the order of Algorithm 1, step 6.

Invariants: each rollout token is used in exactly one update. An update whose loss or gradient norm is not finite is
skipped whole: neither weights nor optimizer state see it. Given weights, optimizer state, seed and window, the step is
a pure function; it draws nothing from global generators.

A rollout with advantage 0 has no gradient (the loss has no KL term), so it takes part in no forward or backward pass of
the updates; its tokens still count in the denominator, and the proximal pass covers it for the measurements.

Shape legend: T response tokens of the window, S its rollouts; R response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zppo.config import MethodConfig, Topology
from zppo.losses import loss_settings, old_log_probs
from zppo.optimizer import AdamW, Gradients
from zppo.training import metrics
from zppo.training.batch import Rollouts, assemble, mini_batches
from zppo.training.layout import MicroBatch, micro_batches
from zppo.training.policy import Policy
from zppo_kernels import PolicyLossSettings, advantage_statistics, group_advantages
from zppo_protocol.messages import TrainWindow


@dataclass(frozen=True)
class StepSettings:
    """What a step needs of the topology. `micro_batch_tokens` bounds the padded tokens of one pass."""

    method: MethodConfig
    loss: PolicyLossSettings
    max_staleness: int
    micro_batch_tokens: int
    gradient_clip: float
    seed: int

    @classmethod
    def of(cls, topology: Topology) -> StepSettings:
        """Raises UserError if the method's values do not go together."""
        return cls(
            method=topology.method,
            loss=loss_settings(topology.method, topology.student.sampling),
            max_staleness=topology.scheduler.max_staleness,
            micro_batch_tokens=topology.actors.trainer.micro_batch_tokens,
            gradient_clip=topology.optimizer.gradient_clip,
            seed=topology.run.seed,
        )


@dataclass
class Trainer:
    """The policy and what updates it. `tick` is called after every micro-batch; `clock` gives seconds."""

    policy: Policy
    optimizer: AdamW
    gradients: Gradients
    settings: StepSettings
    clock: Callable[[], float]
    tick: Callable[[], None] = field(default=lambda: None)

    def micro_batches(self, rollouts: Rollouts, sequences: np.ndarray) -> list[MicroBatch]:
        limit, share = self.settings.micro_batch_tokens, self.policy.shares_prompts
        return micro_batches(rollouts, sequences, limit, share=share)


@dataclass
class _Tally:
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
            **metrics.update_metrics(self.parts),
        }


def train_step(trainer: Trainer, window: TrainWindow) -> dict[str, float]:
    """Train the policy on one window and return the metrics of `zppo.training.metrics.TRAINER_METRICS`.

    Raises StalenessError if the window holds a token older than the bound, before anything is changed.
    """
    settings, begin = trainer.settings, trainer.clock()
    rollouts = assemble(window, max_staleness=settings.max_staleness, device=trainer.policy.device)
    proximal_T, entropy_T = proximal_pass(trainer, rollouts)
    measured = metrics.proximal_metrics(proximal_T, rollouts.behaviour_T, entropy_T)
    middle = trainer.clock()

    tally = _Tally()
    batches = split(rollouts, settings)
    advantages_S = step_advantages(rollouts, batches, settings.method)
    for sequences in batches:
        update(trainer, rollouts, sequences, advantages_S, proximal_T, tally)

    return metrics.finite(
        metrics.window_metrics(rollouts, advantages_S)
        | measured
        | tally.metrics()
        | {"seconds_proximal": middle - begin, "seconds_update": trainer.clock() - middle}
    )


def proximal_pass(trainer: Trainer, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens under the weights the step starts from, float32 [T] each."""
    proximal_T, entropy_T = torch.zeros_like(rollouts.behaviour_T), torch.zeros_like(rollouts.behaviour_T)
    temperature = trainer.settings.loss.temperature
    for batch in trainer.micro_batches(rollouts, np.arange(rollouts.sequences)):
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        proximal_T[batch.tokens_R], entropy_T[batch.tokens_R] = trainer.policy.log_probs(
            batch, targets_R, temperature=temperature
        )
        trainer.tick()
    return proximal_T, entropy_T


def split(rollouts: Rollouts, settings: StepSettings) -> list[np.ndarray]:
    """The rollouts of each of the I mini-batches, as indices; a group is never cut."""
    groups = mini_batches(
        len(rollouts.groups), settings.method.updates_per_step, seed=settings.seed, step=rollouts.step
    )
    return [np.flatnonzero(np.isin(rollouts.group_S, chosen)) for chosen in groups]


def step_advantages(rollouts: Rollouts, batches: list[np.ndarray], method: MethodConfig) -> Tensor:
    """Advantages of all rollouts (Eqs. 2-3), float32 [S]; normalised over each mini-batch, or over the whole step."""
    groups_S = torch.from_numpy(rollouts.group_S)
    shared = None
    if method.advantage_scope == "step" and rollouts.sequences:
        shared = advantage_statistics(rollouts.rewards_S, groups_S, mode=method.advantage)
    advantages_S = torch.zeros_like(rollouts.rewards_S)
    for sequences in batches:
        local = np.unique(rollouts.group_S[sequences], return_inverse=True)[1]
        advantages_S[sequences] = group_advantages(
            rollouts.rewards_S[sequences], torch.from_numpy(local), mode=method.advantage, statistics=shared
        )
    return advantages_S


def update(
    trainer: Trainer,
    rollouts: Rollouts,
    sequences: np.ndarray,
    advantages_S: Tensor,
    proximal_T: Tensor,
    tally: _Tally,
) -> None:
    """One optimizer update on one mini-batch: sum gradients over its micro-batches, check, clip, step.

    A mini-batch in which no rollout has an advantage has nothing to say and makes no update.
    """
    trainer.gradients.clear()
    live = sequences[(advantages_S[sequences].numpy() != 0) & (rollouts.lengths_S[sequences] > 0)]
    if not len(live):
        return
    counts = {"token_count": int(rollouts.lengths_S[sequences].sum()), "sequence_count": len(sequences)}
    loss, parts = torch.zeros((), device=rollouts.device), []
    for batch in trainer.micro_batches(rollouts, live):
        part_loss, part_metrics = _accumulate(trainer, rollouts, batch, advantages_S, proximal_T, counts)
        loss += part_loss
        parts.append(part_metrics)
        trainer.tick()
    norm = trainer.gradients.norm()
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        tally.skipped += 1
        return
    trainer.gradients.clip(norm, trainer.settings.gradient_clip)
    trainer.optimizer.step(trainer.gradients.tensors())
    tally.losses.append(float(loss))
    tally.norms.append(float(norm))
    tally.parts += parts


def _accumulate(
    trainer: Trainer,
    rollouts: Rollouts,
    batch: MicroBatch,
    advantages_S: Tensor,
    proximal_T: Tensor,
    counts: dict[str, int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of one micro-batch. `counts` are those of the whole mini-batch, so the parts sum to its loss."""
    old_R, behaviour_R = old_log_probs(
        trainer.settings.method, proximal_T[batch.tokens_R], rollouts.behaviour_T[batch.tokens_R]
    )
    output = trainer.policy.loss(
        batch,
        rollouts.token_ids_T[batch.tokens_R],
        sequence_ids_T=batch.sequence_ids_R,
        advantages_S=advantages_S.to(rollouts.device)[batch.sequences_S],
        proximal_log_probs_T=old_R,
        behaviour_log_probs_T=behaviour_R,
        settings=trainer.settings.loss,
        **counts,
    )
    output.loss.backward()
    return output.loss.detach(), output.metrics
