"""What a training step works with: the policy and what updates it, what it minimises, and the
settings that the topology gives it.

Shape legend: S rollouts of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
from torch import Tensor

from zppo.algorithm.methods import Method, get_method
from zppo.algorithm.methods.base import Loss
from zppo.config.method import MethodConfig
from zppo.config.rewards import parts_of
from zppo.config.topology import Topology
from zppo.training.batch import Reach, Rollouts
from zppo.training.entropy import EntropyState
from zppo.training.layout import Deal, MicroBatch, deal_passes
from zppo.training.loss_settings import loss_settings
from zppo.training.measuring import Measuring
from zppo.training.optimizer import AdamW, Gradients
from zppo.training.pictures import SeenPrompt
from zppo.training.policy import Policy
from zppo.training.ranks import ALONE, Ranks
from zppo_kernels import PolicyLossSettings
from zppo_protocol.samples import TrainGroup


@dataclass(frozen=True)
class StepSettings:
    """What a step needs of the topology. `micro_batch_tokens` bounds the padded tokens of one pass.

    `method` are the words of the topology, after the method itself has said which of them it fixes.
    """

    method: MethodConfig
    objective: Loss
    loss: PolicyLossSettings
    max_staleness: int
    micro_batch_tokens: int
    gradient_clip: float
    seed: int
    measured_rollouts: Measuring
    reward_weights: tuple[float, ...] = ()
    """of the parts of a reward, in the order of `data.reward`"""

    @classmethod
    def of(cls, topology: Topology) -> StepSettings:
        """Raises UserError if the method's values do not go together."""
        chosen = get_method(topology.method.name)
        method = _fixed_by(chosen, topology.method)
        return cls(
            method=method,
            objective=chosen.loss,
            loss=loss_settings(method, topology.student.sampling),
            max_staleness=topology.scheduler.max_staleness,
            micro_batch_tokens=topology.actors.trainer.micro_batch_tokens,
            gradient_clip=topology.optimizer.gradient_clip,
            seed=topology.run.seed,
            measured_rollouts=topology.actors.trainer.measured_rollouts,
            reward_weights=tuple(part.weight for part in parts_of(topology.data.reward)),
        )


def _fixed_by(chosen: Method, words: MethodConfig) -> MethodConfig:
    if chosen.updates_per_step is None:
        return words
    return msgspec.structs.replace(words, updates_per_step=chosen.updates_per_step)


@dataclass
class Trainer:
    """The policy and what updates it. `tick` is called after every micro-batch; `clock` gives
    seconds.

    `teacher` is the frozen model of a distillation whose teacher is colocated; a remote one sends
    scores instead. `reference` is the frozen student that the run began with, where the loss has a
    KL to it. `entropy` is the state of an entropy coefficient that moves, None where it is fixed.
    """

    policy: Policy
    optimizer: AdamW
    gradients: Gradients
    settings: StepSettings
    clock: Callable[[], float]
    tick: Callable[[], None] = field(default=lambda: None)
    teacher: Policy | None = None
    reference: Policy | None = None
    entropy: EntropyState | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies in the student's folder beside configuration and weights, by name; checkpoints
    hold it as it was read."""
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """What one model of a distillation leaves out of its softmax both do, or the divergence
        would be infinite."""
        for model in self._compared():
            model.leave_out(self.reach.unsampled)

    @property
    def reach(self) -> Reach:
        """What all models of the trainer can read."""
        reaches = [model.reach for model in self._compared()]
        return Reach(
            vocabulary=min(reach.vocabulary for reach in reaches),
            context=min(reach.context for reach in reaches),
            unsampled=tuple(sorted({one for reach in reaches for one in reach.unsampled})),
        )

    def look(self, group: TrainGroup) -> SeenPrompt | None:
        """The pictures of a group's prompt, as all models of the trainer read them. Raises
        UserError for a prompt that one of them would read otherwise."""
        if self.teacher is not None:
            self.teacher.look(group)
        return self.policy.look(group)

    def micro_batches(self, rollouts: Rollouts, sequences: np.ndarray) -> list[MicroBatch]:
        """This rank's forward passes over these rollouts."""
        return self.deal(rollouts, sequences).batches

    def deal(self, rollouts: Rollouts, sequences: np.ndarray) -> Deal:
        """The same, and how many passes all ranks make; laid out so that every model that reads
        them can."""
        models = self._compared() + ([] if self.reference is None else [self.reference])
        return deal_passes(
            rollouts,
            sequences,
            self.settings.micro_batch_tokens,
            share=all(model.shares_prompts for model in models),
            long=all(model.shares_long_rows for model in models),
            crowded=all(model.shares_states for model in models),
            rank=self.ranks.rank,
            ranks=self.ranks.count,
        )

    def _compared(self) -> list[Policy]:
        """The policy, and the teacher that it is compared with, if there is one here."""
        return [self.policy] if self.teacher is None else [self.policy, self.teacher]


@dataclass(frozen=True)
class Counts:
    """What a mini-batch is made of, over all ranks: response tokens, rollouts, and the
    micro-batches that its rollouts with a gradient are laid out in."""

    tokens: int
    sequences: int
    micro_batches: int


class Objective(Protocol):
    """The loss of one window. Parts of a mini-batch add up to its loss; metrics are sums as in
    `zppo_kernels`."""

    def live(self, sequences: np.ndarray) -> np.ndarray:
        """Those of the rollouts that have a gradient."""

    def prepare(self, first: np.ndarray) -> None:
        """Measure what the loss needs of the weights that the step starts from, but for the
        rollouts `first`: their own passes come before any update and can give it."""

    def loss(
        self, batch: MicroBatch, counts: Counts, *, first: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss of a mini-batch of these counts, and its metrics,
        both without the micro-batch's weight. `first`: it belongs to the rollouts that `prepare`
        left out."""

    def applied(self, parts: list[dict[str, Tensor]]) -> None:
        """The optimizer has made the update whose micro-batches gave these metrics."""

    def metrics(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """What it measured, after the updates; `parts` are the metrics of the applied ones. All
        ranks must ask."""
