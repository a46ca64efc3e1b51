"""What one rollout step is made of: windows, visits, groups and candidates.

A *window* is one rollout step of Algorithm 1. It holds one *visit* per question of X = X_new ∪ X_replay. A visit
gathers the question's plain group, its teacher group, and the reformulated groups (BCQ, NCQ, …) with the candidates
shown in them. These are plain values, serialised by msgspec with the state of the scheduler and written to the rollout
store.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct, field

from zppo.questions import Question
from zppo_protocol.messages import Grade, GroupSamples, Prompt

PLAIN, TEACHER, COMPRESS, BCQ, NCQ, EVALUATE = "plain", "teacher", "compress", "bcq", "ncq", "evaluate"


class Group(Struct, kw_only=True):
    """All rollouts of one prompt. `id` is unique in a run, e.g. `12/q-17/bcq`: it has its own baseline (own uid)."""

    id: str
    kind: str
    prompt: Prompt
    samples: GroupSamples | None = None
    grades: list[Grade] | None = None
    verdicts: dict[int, Grade] = field(default_factory=dict)
    """Grades so far by response, while a judge is still at work on the others."""

    @property
    def done(self) -> bool:
        return self.grades is not None

    @property
    def the_samples(self) -> GroupSamples:
        """The samples of a group that has them."""
        assert self.samples is not None, f"group {self.id} is not sampled"
        return self.samples

    @property
    def accuracy(self) -> float:
        """Mean reward r̄ of the group."""
        assert self.grades is not None
        return sum(grade.reward for grade in self.grades) / len(self.grades)

    @property
    def rewards(self) -> np.ndarray:
        """[N] float32."""
        assert self.grades is not None
        return np.array([grade.reward for grade in self.grades], dtype=np.float32)

    def indices(self, *, correct: bool) -> list[int]:
        """Positions of the correct (reward 1) or the wrong rollouts."""
        assert self.grades is not None
        return [i for i, grade in enumerate(self.grades) if (grade.reward >= 1.0) == correct]


class Candidate(Struct, kw_only=True):
    """A response shown inside a reformulated prompt: where it came from, and its compressed text once known."""

    source: Literal["student", "teacher"]
    index: int
    text: str
    answer: str | None
    correct: bool
    compressed: str | None = None


class Reformulation(Struct, kw_only=True):
    """A rewritten prompt of one visit: its candidates in the order shown, and its group once the prompt is built."""

    kind: str
    candidates: list[Candidate]
    group: Group | None = None


class Visit(Struct, kw_only=True):
    """One question in one window."""

    question: Question
    origin: Literal["new", "replay"]
    plain: Group
    epoch: int = 0
    """Pass over the corpus that a new question belongs to."""
    teacher: Group | None = None
    reformulations: list[Reformulation] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.plain.accuracy

    def trained_groups(self) -> list[Group]:
        """The groups whose tokens enter the loss: plain first, then the reformulated ones."""
        return [self.plain, *(r.group for r in self.reformulations if r.group is not None)]


class Window(Struct, kw_only=True):
    """One rollout step. `index` is also the training step that consumes it."""

    index: int
    visits: list[Visit]
    reformulated: bool = False
    """Whether both caps have been decided, i.e. the reformulations of the visits are final."""
    hard_questions: int = 0
    """Visits with r̄_x < τ, known once the window is reformulated."""

    @property
    def new_count(self) -> int:
        """|X_new|."""
        return sum(visit.origin == "new" for visit in self.visits)

    def groups(self) -> list[Group]:
        """All groups that enter the loss."""
        return [group for visit in self.visits for group in visit.trained_groups()]
