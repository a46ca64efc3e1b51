"""What a simulated run is made of: its topology, how fast its machines are, and what its questions
are like.

All times are in seconds of the virtual clock, all lengths in tokens.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field, structs

from zppo.config.base import (
    Config,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
)
from zppo.config.served import teachers
from zppo.config.topology import Topology

AtLeastOne = Annotated[float, Meta(ge=1.0, le=1e6)]


class Curve(Config, frozen=True, kw_only=True):
    """Seconds of one token step of an engine, in which each of its n running sequences advances
    by one token: `fixed` + `per_sequence` · n.

    Measured `points` (n, seconds), in ascending n, take the place of the line: between them it is
    straight, before the first it is flat, after the last it goes on as between the last two.
    """

    fixed: NonNegativeFloat = 0.0
    per_sequence: NonNegativeFloat = 0.0
    points: tuple[tuple[Positive, PositiveFloat], ...] = ()

    def seconds(self, running: int) -> float:
        if not self.points:
            return self.fixed + self.per_sequence * running
        if running <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        for (low, before), (high, after) in zip(self.points, self.points[1:], strict=False):
            slope = (after - before) / (high - low)
            if running <= high:
                break
        return before + slope * (running - low)

    def best_rate(self, slots: int) -> float:
        """Most tokens a second with up to `slots` sequences."""
        return max(n / self.seconds(n) for n in range(1, slots + 1))


class Engines(Config, frozen=True, kw_only=True):
    """The engines of one pool; how many there are says the topology."""

    slots: Positive
    """sequences at once, each engine"""
    curve: Curve
    load_seconds: NonNegativeFloat = 0.0
    """how long the running sequences stand still while a new policy version is loaded"""
    prompt_steps: NonNegativeFloat = 1.0
    """what reading the prompt takes of a sequence, in token steps"""


class Graders(Config, frozen=True, kw_only=True):
    """How long the grading of one group occupies one grader."""

    seconds: NonNegativeFloat = 0.0


class TrainerSpeed(Config, frozen=True, kw_only=True):
    """A step takes `fixed` + tokens / `tokens_per_second`; tokens are those of all responses, and
    each group's prompt once. Then the weights are published, which the trainer waits for."""

    fixed: NonNegativeFloat = 0.0
    tokens_per_second: PositiveFloat
    publish_seconds: NonNegativeFloat = 0.0


class Lengths(Config, frozen=True, kw_only=True):
    """Lengths of responses: lognormal with this `median` and ratio of the 99th percentile to it, or
    drawn from `values` where there are any. `cap`, and the limit of the task, cut off.

    `of_question` is the share of the logarithm's variance that belongs to the question.
    `hard_ratio`: how many times longer responses to a question are that is never answered than to
    one that always is; the median is that of a question answered half of the time. Both are of the
    lognormal alone.
    """

    median: PositiveFloat = 1.0
    p99_ratio: AtLeastOne = 1.0
    cap: Positive = 1_000_000
    of_question: Share = 0.0
    hard_ratio: PositiveFloat = 1.0
    values: tuple[Positive, ...] = ()


class Accuracies(Config, frozen=True, kw_only=True):
    """How often each question is answered correctly: a Beta distribution over questions, or drawn
    from `values` where there are any."""

    alpha: PositiveFloat = 0.6
    beta: PositiveFloat = 0.6
    values: tuple[Share, ...] = ()
    teacher: Share = 0.7
    """chance of a response of the teacher to a question that it was asked"""
    reformulated: Share = 0.3
    """share of the student's failures that BCQ, NCQ, a hint or a prefix turns into successes"""


class Speeds(Config, frozen=True, kw_only=True):
    """How fast the machines of a run are: what a calibration measures. `teachers` are those of the
    topology in their order; the last one stands for those after it."""

    rollout: Engines
    trainer: TrainerSpeed
    teachers: tuple[Engines, ...] = ()
    grader: Graders = Graders()


class World(Config, frozen=True, kw_only=True):
    """A run to simulate. Everything that the topology says of scheduling holds; files and models
    that it names are not looked at."""

    topology: Topology
    speeds: Speeds
    lengths: Lengths
    lengths_of: dict[str, Lengths] = field(default_factory=dict)
    """other lengths by kind of task: bcq, ncq, hint, prefix, teacher, compress, write_hint,
    evaluate"""
    accuracies: Accuracies = Accuracies()
    prompt_tokens: Positive = 1
    corpus: Positive | None = None
    """questions of the corpus; null: as many as the steps need in one pass"""
    heldout: NonNegative = 0
    """questions of the held-out evaluation"""
    ends: bool = False
    """whether nothing follows the simulated steps; false: they are the first of an endless run"""

    @classmethod
    def of(cls, topology: Topology, speeds: Speeds, lengths: Lengths) -> World:
        """The run of a topology on machines of these speeds."""
        return cls(topology=topology, speeds=speeds, lengths=lengths)

    def with_bound(self, max_staleness: int) -> World:
        """The same with another bound on staleness."""
        scheduler = structs.replace(self.topology.scheduler, max_staleness=max_staleness)
        return structs.replace(self, topology=structs.replace(self.topology, scheduler=scheduler))

    def pools(self) -> dict[str, tuple[int, Engines]]:
        """Pool -> how many engines it has, and what they are like."""
        found = {"rollout": (self.topology.actors.rollout.count, self.speeds.rollout)}
        for served in teachers(self.topology) if self.speeds.teachers else ():
            speeds = self.speeds.teachers[min(served.index, len(self.speeds.teachers) - 1)]
            found[served.pool] = (served.actor.count, speeds)
        return found
