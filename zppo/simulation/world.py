"""What a simulated run is made of: its topology, how fast its machines are, and what its questions
are like.

All times are in seconds of the virtual clock, all lengths in tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from msgspec import Meta, field, structs

from zppo.algorithm.methods import get_method
from zppo.config.base import (
    Config,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
)
from zppo.config.served import ServedModel
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.processes import asked_teachers

AtLeastOne = Annotated[float, Meta(ge=1.0, le=1e6)]


class Measured(Config, frozen=True, kw_only=True, omit_defaults=True):
    """Part of a calibration; a file need not say what is as usual."""


class Curve(Measured, frozen=True, kw_only=True):
    """Seconds of one token step of an engine, in which each of its n running sequences advances
    by one token: `fixed` + `per_sequence` · n.

    Measured `points` (n, seconds), in ascending n, take the place of the line: between them it is
    straight, before the first it is flat, after the last it goes on as between the last two, but
    does not fall.
    """

    fixed: NonNegativeFloat = 0.0
    per_sequence: NonNegativeFloat = 0.0
    points: tuple[tuple[Positive, PositiveFloat], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a curve that is none."""
        line = self.fixed + self.per_sequence
        if bool(self.points) == (line > 0.0):
            raise ValueError(
                "a curve needs points: [[running sequences, seconds], …], or fixed and "
                "per_sequence, of which one is above 0; not both"
            )
        for (low, _), (high, _) in pairwise(self.points):
            if low >= high:
                raise ValueError(
                    f"points: {low} is followed by {high}; list each number of running sequences "
                    "once, in ascending order"
                )

    def seconds(self, running: int) -> float:
        if not self.points:
            return self.fixed + self.per_sequence * running
        if running <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        for (low, before), (high, after) in pairwise(self.points):
            if running <= high:
                return before + (after - before) / (high - low) * (running - low)
        return after + max(0.0, after - before) / (high - low) * (running - high)

    def best_rate(self, slots: int) -> float:
        """Most tokens a second with up to `slots` sequences."""
        return max(n / self.seconds(n) for n in range(1, slots + 1))


class Engines(Measured, frozen=True, kw_only=True):
    """The engines of one pool; how many there are says the topology."""

    slots: Positive
    """sequences at once, each engine"""
    curve: Curve
    load_seconds: NonNegativeFloat = 0.0
    """how long the running sequences stand still while a new policy version is loaded"""
    prompt_steps: NonNegativeFloat = 1.0
    """what reading the prompt takes of a sequence, in token steps"""


class Graders(Measured, frozen=True, kw_only=True):
    """How long the grading of one group occupies one grader."""

    seconds: NonNegativeFloat = 0.0


class TrainerSpeed(Measured, frozen=True, kw_only=True):
    """A step takes `fixed` + tokens / `tokens_per_second`; tokens are those of all responses, and
    each group's prompt once. Then the weights are published, which the trainer waits for."""

    fixed: NonNegativeFloat = 0.0
    tokens_per_second: PositiveFloat
    publish_seconds: NonNegativeFloat = 0.0


class Lengths(Measured, frozen=True, kw_only=True):
    """Lengths of responses: lognormal with this `median` and ratio of the 99th percentile to it, or
    `values` where there are any, each as probable as the other. `cap`, and the limit of the task,
    cut off.

    `of_question` is the share of the logarithm's variance that belongs to the question; with
    `values` of the variance of the normal variable that chooses among them (a Gaussian copula).
    `hard_ratio`: how many times longer responses to a question are that is never answered than to
    one that always is; the median is that of a question answered half of the time. It is of the
    lognormal alone.
    """

    median: PositiveFloat = 1.0
    p99_ratio: AtLeastOne = 1.0
    cap: Positive = 1_000_000
    of_question: Share = 0.0
    hard_ratio: PositiveFloat = 1.0
    values: tuple[Positive, ...] = ()


class Accuracies(Measured, frozen=True, kw_only=True):
    """How often each question is answered correctly: a Beta distribution over questions, or drawn
    from `values` where there are any."""

    alpha: PositiveFloat = 0.6
    beta: PositiveFloat = 0.6
    values: tuple[Share, ...] = ()
    teacher: Share = 0.7
    """chance of a response of the teacher to a question that it was asked"""
    reformulated: Share = 0.3
    """share of the student's failures that BCQ, NCQ, a hint or a prefix turns into successes"""


class Speeds(Measured, frozen=True, kw_only=True):
    """How fast the machines of a run are: what a calibration measures. `teachers` are those of the
    topology in their order; the last one stands for those after it."""

    rollout: Engines
    trainer: TrainerSpeed
    teachers: tuple[Engines, ...] = ()
    grader: Graders = Graders()


class Calibration(Measured, frozen=True, kw_only=True):
    """What is measured of machines and questions: all of a run that its topology does not say."""

    settings: dict[str, Any] = field(default_factory=dict)
    """what it was measured with, by the name of the setting; nothing is drawn from it"""
    speeds: Speeds
    lengths: Lengths
    lengths_of: dict[str, Lengths] = field(default_factory=dict)
    """other lengths by kind of task: bcq, ncq, hint, prefix, teacher, compress, write_hint,
    evaluate"""
    accuracies: Accuracies = Accuracies()
    prompt_tokens: Positive = 1
    """of a group that is trained on, on the average"""


class World(Calibration, frozen=True, kw_only=True, omit_defaults=False):
    """A run to simulate. Everything that the topology says of scheduling holds; files and models
    that it names are not looked at."""

    topology: Topology
    corpus: Positive | None = None
    """questions of the corpus; null: as many as the steps need in one pass"""
    heldout: NonNegative = 0
    """questions of the held-out evaluation"""
    ends: bool = False
    """whether nothing follows the simulated steps; false: they are the first of an endless run"""

    @classmethod
    def of(
        cls,
        topology: Topology,
        calibration: Calibration,
        *,
        corpus: int | None = None,
        heldout: int = 0,
    ) -> World:
        """The run of a topology on the machines of a calibration."""
        fields = structs.asdict(calibration)
        return cls(topology=topology, corpus=corpus, heldout=heldout, **fields)

    def with_bound(self, max_staleness: int) -> World:
        """The same with another bound on staleness."""
        scheduler = structs.replace(self.topology.scheduler, max_staleness=max_staleness)
        return structs.replace(self, topology=structs.replace(self.topology, scheduler=scheduler))

    def pools(self) -> dict[str, tuple[int, Engines]]:
        """Pool -> how many engines it has, and what they are like."""
        found = {"rollout": (self.topology.actors.rollout.count, self.speeds.rollout)}
        for served in asked_teachers(self.topology) if self.speeds.teachers else ():
            found[served.pool] = (served.actor.count, self.speeds.teachers[self._place(served)])
        return found

    def check(self) -> None:
        """Raises UserError where a job would wait for ever: nobody does it, or it finds no room in
        an engine, which takes a group as a whole."""
        asked = asked_teachers(self.topology)
        if asked and not self.speeds.teachers:
            raise UserError(
                "speeds.teachers is missing; expected those of the topology's teachers, because "
                "the method asks them"
            )
        jobs = [("rollout", self.speeds.rollout, self._student_jobs())]
        for served in asked:
            place = self._place(served)
            name, engines = f"teachers[{place}]", self.speeds.teachers[place]
            jobs.append((name, engines, self._teacher_jobs(served.index)))
        for name, engines, sizes in jobs:
            setting = max(sizes, key=lambda setting: sizes[setting])
            if engines.slots < sizes[setting]:
                raise UserError(
                    f"speeds.{name}.slots is {engines.slots}; expected at least {sizes[setting]}, "
                    f"{setting}, because an engine samples a group at once"
                )

    def _place(self, served: ServedModel) -> int:
        return min(served.index, len(self.speeds.teachers) - 1)

    def _student_jobs(self) -> dict[str, int]:
        """Setting -> sequences of a job of the student."""
        sizes = {"method.group_size": self.topology.method.group_size}
        if self.heldout:
            sizes["evaluation.samples"] = self.topology.evaluation.samples
        return sizes

    def _teacher_jobs(self, index: int) -> dict[str, int]:
        """The same of a teacher; the first one also scores the student's groups."""
        method, teacher = self.topology.method, self.topology.teacher
        sizes = {"method.teacher_group_size": method.teacher_group_size}
        scores = teacher is not None and teacher.scoring == "remote"
        if scores and not index and get_method(method.name).needs_scores:
            sizes["method.group_size"] = method.group_size
        return sizes
