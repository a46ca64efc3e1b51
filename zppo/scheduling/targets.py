"""What is wanted of a worker, and where its result belongs.

A target is one of five: a group to sample, a group to grade, one response of it to judge, a
candidate to prepare, a composed group to score. Its `task_id` says what is wanted and of whom, so
that two targets with the same id are the same job; its `order` says which job goes first.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from zppo.algorithm.composition import Composition
from zppo.algorithm.reformulations import Preparation
from zppo.algorithm.window import EVALUATE, PLAIN, SCORE, TEACHER, Candidate, Group, Visit, Window
from zppo.config.topology import JUDGE
from zppo.data.question import Question

Order: TypeAlias = tuple[int, int]
"""(window, stage in it); the smaller goes first."""
EARLY_KINDS = (PLAIN, TEACHER, EVALUATE)
"""Within a window the later stages go first: they are nearest to completing it. These kinds come
after all others."""
EVALUATION_ORDER = -1
"""Evaluations go before all windows, so that they see the policy they ask for."""


class Place(Struct, frozen=True):
    """A visit and the window it is in."""

    window: Window
    visit: Visit


class GroupTarget(Struct, frozen=True, kw_only=True):
    """What targets that speak of a group have in common. Without a place, the group is one of a
    held-out evaluation."""

    group: Group
    question: Question
    place: Place | None = None

    @property
    def order(self) -> Order:
        window = self.place.window.index if self.place is not None else EVALUATION_ORDER
        return window, int(self.group.kind in EARLY_KINDS)


class SampleTarget(GroupTarget, frozen=True, kw_only=True):
    """All completions of a group."""

    @property
    def task_id(self) -> str:
        return self.group.id

    @property
    def kind(self) -> str:
        """What is asked for, in one word, for the counts of a window."""
        return self.group.kind

    @property
    def name(self) -> str:
        """In plain words, for the live view."""
        return self.group.kind


class GradeTarget(GroupTarget, frozen=True, kw_only=True):
    """The grades of all responses of a group, by rule."""

    @property
    def task_id(self) -> str:
        return f"{self.group.id}/grade"

    @property
    def kind(self) -> str:
        return "grade"

    @property
    def name(self) -> str:
        return f"{self.group.kind} grades"


class JudgeTarget(GroupTarget, frozen=True, kw_only=True):
    """The judge's verdict on one `response` of a group."""

    response: int

    @property
    def task_id(self) -> str:
        return f"{self.group.id}/judge-{self.response}"

    @property
    def kind(self) -> str:
        return JUDGE

    @property
    def name(self) -> str:
        return f"{self.group.kind} grades"


class PrepareTarget(Struct, frozen=True, kw_only=True):
    """What a rewritten prompt shows of a candidate: its compressed text, or a hint written from
    it."""

    place: Place
    candidate: Candidate
    preparation: Preparation

    @property
    def task_id(self) -> str:
        where = f"{self.place.window.index}/{self.place.visit.question.id}"
        return f"{where}/{self.preparation}/{self.candidate.source}-{self.candidate.index}"

    @property
    def order(self) -> Order:
        return self.place.window.index, 0

    @property
    def kind(self) -> str:
        return self.preparation

    @property
    def name(self) -> str:
        return self.kind


class ScoreTarget(Struct, frozen=True, kw_only=True):
    """The teacher's distribution at the tokens of a composed group."""

    place: Place
    composition: Composition

    @property
    def task_id(self) -> str:
        return f"{self.composition.id}/{SCORE}"

    @property
    def order(self) -> Order:
        return self.place.window.index, 0

    @property
    def kind(self) -> str:
        return SCORE

    @property
    def name(self) -> str:
        return self.kind


Target: TypeAlias = SampleTarget | GradeTarget | JudgeTarget | PrepareTarget | ScoreTarget
