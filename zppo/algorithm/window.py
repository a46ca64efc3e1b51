"""What one rollout step is made of: windows, visits, groups and candidates.

A *window* is one rollout step of Algorithm 1. It holds one *visit* per question of X = X_new ∪
X_replay. A visit gathers the question's plain group, its teacher group, and the reformulated groups
(BCQ, NCQ, …) with the candidates shown in them. These are plain values, serialised by msgspec with
the state of the scheduler and written to the rollout store.

A window goes through phases, each entered when the one before misses nothing more
(`zppo.scheduling.stages`): plain → selected → reformulated → composed.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from msgspec import Struct, field, structs

from zppo.data.question import Question
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import Grade, Prompt

PLAIN, TEACHER, EVALUATE = "plain", "teacher", "evaluate"
BCQ, NCQ, HINT, PREFIX = "bcq", "ncq", "hint", "prefix"
COMPRESS, WRITE_HINT, SCORE = "compress", "write_hint", "score"

Phase: TypeAlias = Literal["plain", "selected", "reformulated", "composed"]
Progress: TypeAlias = Literal["nothing", "plain", "all"]


class Group(Struct, kw_only=True, omit_defaults=True):
    """All rollouts of one prompt. `id` is unique in a run, e.g. `12/q-17/bcq`: it has its own
    baseline (own uid).

    Advantages are made of rewards; what is right, wrong, hard or mastered goes by *correctness*, a
    reward of at least `correct_reward`. A rollout whose reward failed is neither right nor wrong.
    """

    id: str
    kind: str
    prompt: Prompt
    teacher: int = 0
    """Which of the teachers writes a teacher group."""
    samples: GroupSamples | None = None
    grades: list[Grade] | None = None
    verdicts: dict[int, Grade] = field(default_factory=dict)
    """Grades so far by response, while a judge is still at work on the others."""
    local: list[Grade] | None = None
    """What the grading workers gave, while the teacher's part of the reward is still missing."""
    correct_reward: float = 1.0
    """`method.correct_reward`"""

    @property
    def done(self) -> bool:
        return self.grades is not None

    @property
    def the_samples(self) -> GroupSamples:
        """The samples of a group that has them."""
        assert self.samples is not None, f"group {self.id} is not sampled"
        return self.samples

    @property
    def the_grades(self) -> list[Grade]:
        """The grades of a group that is done."""
        assert self.grades is not None, f"group {self.id} is not graded"
        return self.grades

    @property
    def known(self) -> bool:
        """Whether the reward of any rollout could be had."""
        return any(not grade.failed for grade in self.the_grades)

    @property
    def accuracy(self) -> float:
        """r̄ of the group: share of correct rollouts among those whose reward could be had, 0
        without any."""
        correct = self.correctness()
        return sum(correct) / len(correct) if correct else 0.0

    def correctness(self) -> list[bool]:
        """Whether each graded rollout is correct; those whose reward failed are left out."""
        # What `is_correct` says, without a call for each of millions.
        enough = self.correct_reward
        return [g.reward >= enough for g in self.grades or () if not g.failed]

    def is_correct(self, grade: Grade) -> bool:
        return not grade.failed and grade.reward >= self.correct_reward

    @property
    def rewards(self) -> np.ndarray:
        """[N] float32."""
        return np.array([grade.reward for grade in self.the_grades], dtype=np.float32)

    def indices(self, *, correct: bool) -> list[int]:
        """Positions of the correct or the wrong rollouts."""
        return [
            i
            for i, grade in enumerate(self.the_grades)
            if not grade.failed and self.is_correct(grade) == correct
        ]

    def found_wrong(self) -> list[int]:
        """Positions of the rollouts that may be shown as wrong ones: graded, and not right. What
        only counts as wrong, because its grading came to no end or its right answer was cut off or
        earns too little, is not among them."""
        wrong = self.indices(correct=False)
        return [index for index in wrong if not self.the_grades[index].undecided]


Writer: TypeAlias = Literal["teacher", "rule"] | None


class Candidate(Struct, kw_only=True):
    """A response that a reformulated prompt is made from.

    `shown` is what the prompt shows of it, once known: its compressed text, or the hint written
    from it. `writer` says who wrote that where the teacher was asked to: `rule` if what it wrote
    cannot be used. `count` is how many near-duplicates it stands for, itself included.
    """

    source: Literal["student", "teacher"]
    index: int
    text: str
    answer: str | None
    correct: bool
    shown: str | None = None
    writer: Writer = None
    count: int = 1


class Reformulation(Struct, kw_only=True):
    """A rewritten prompt of one visit: its candidates in the order shown, and its group once the
    prompt is built."""

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
    selected: bool = False
    """One of the hardest questions, on which alone some methods ask the teacher (X_aug of
    Algorithms 5 and 6)."""
    teacher: Group | None = None
    failed_teachers: list[Group] = field(default_factory=list)
    """Groups of teachers that had no correct response, so that the next one was asked."""
    reformulations: list[Reformulation] = field(default_factory=list)
    scores: dict[str, TokenScores] = field(default_factory=dict)
    """The remote teacher's scores by the id of the composed group."""
    trained: Progress = "nothing"
    """What earlier steps have trained of it. Of a visit whose plain group they have trained only
    what was made of it is still to come."""

    @property
    def accuracy(self) -> float:
        return self.plain.accuracy

    @property
    def window(self) -> int:
        """Index of the window that it was opened in."""
        return int(self.plain.id.partition("/")[0])

    @property
    def late(self) -> bool:
        """Whether its plain group was trained in an earlier step."""
        return self.trained != "nothing"

    def teacher_groups(self) -> list[Group]:
        """The groups of all teachers that were asked, in their order."""
        return [*self.failed_teachers, *([self.teacher] if self.teacher is not None else [])]

    def student_groups(self) -> list[Group]:
        """The groups the student sampled, but for a plain one that was trained before: plain
        first, then the reformulated ones."""
        return [*([] if self.late else [self.plain]), *self.reformulated_groups()]

    def reformulated_groups(self) -> list[Group]:
        """The groups of the rewritten prompts, as far as these are built."""
        return [r.group for r in self.reformulations if r.group is not None]


class Window(Struct, kw_only=True):
    """One rollout step. `index` is also the training step that consumes it."""

    index: int
    visits: list[Visit]
    phase: Phase = "plain"
    hard_questions: int = 0
    """Visits with r̄_x < τ, known once the window is reformulated."""
    spent: dict[str, int] = field(default_factory=dict)
    """Tokens read and written by the teacher for what leaves no group here (`spend`)."""
    tasks: dict[str, int] = field(default_factory=dict)
    """What became of the window's tasks: `answered/POOL` and `given_up/POOL` count tasks,
    `failed/KIND/ACTOR` counts tries."""

    @property
    def new_count(self) -> int:
        """|X_new|."""
        return sum(visit.origin == "new" for visit in self.visits)

    @property
    def plain_visits(self) -> list[Visit]:
        """The visits without those that are here only for what was made of their plain group."""
        return [visit for visit in self.visits if not visit.late]

    def spend(self, samples: GroupSamples) -> None:
        """Add what a job cost whose samples are not kept with the window (a compression, a verdict
        of the judge)."""
        for name, count in (("read", samples.read_tokens), ("written", samples.written_tokens)):
            self.spent[name] = self.spent.get(name, 0) + count

    def count_task(self, outcome: str) -> None:
        """Count one outcome under its name in `tasks`."""
        self.tasks[outcome] = self.tasks.get(outcome, 0) + 1

    def student_groups(self) -> list[Group]:
        """All groups the student sampled."""
        return [group for visit in self.visits for group in visit.student_groups()]


def unsampled(window: Window) -> Window:
    """The same questions with nothing sampled that is not trained.

    Where plain groups of the window are trained its caps may be decided. Then they stay: a question
    that is answered again is rewritten no more if they are. But the window is composed anew.
    """
    visits = [_unsampled(visit) for visit in window.visits]
    if not any(visit.late for visit in visits):
        return Window(index=window.index, visits=visits)
    phase: Phase = "reformulated" if window.phase == "composed" else window.phase
    return structs.replace(window, visits=visits, phase=phase)


def _unsampled(visit: Visit) -> Visit:
    if visit.trained == "all":
        return visit
    if not visit.late:
        return Visit(
            question=visit.question,
            origin=visit.origin,
            epoch=visit.epoch,
            plain=_fresh(visit.plain),
        )
    again = [
        structs.replace(r, group=None if r.group is None else _fresh(r.group))
        for r in visit.reformulations
    ]
    return structs.replace(visit, reformulations=again)


def _fresh(group: Group) -> Group:
    """The same prompt, asked anew."""
    return Group(
        id=group.id,
        kind=group.kind,
        prompt=group.prompt,
        correct_reward=group.correct_reward,
    )
