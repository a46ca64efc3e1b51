"""Algorithm 1 of the paper, as pure functions in the paper's order; Algorithms 2 to 6 are the same
steps with other values of the method.

Step 1  plain rollouts        `draw_replayed`       X = X_new ∪ X_replay
Step 2  teacher rollouts      `is_hard`             afresh for every x with r̄_x < τ
Step 3  pre-cap               `pre_cap`             the ρ_aug·|X_new| hardest that admit one
Step 4  build prompts         `Reformulator.prompt` from candidates prepared by the teacher
Step 5  post-cap              `post_cap`            at most ρ_aug·|X_new| of BCQ + NCQ together
Step 6  update and refresh    `compose`, `zppo.training`, `refresh_buffer`

Nothing here knows of time, processes or versions; `zppo.scheduling.scheduler` calls these functions
when their inputs are known. Which groups a window gets depends only on the graded rollouts, so both
caps are decided before anything is compressed. Algorithms 5 and 6 ask the teacher only about the
questions that step 3 has kept, so there step 3 comes before step 2.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal, TypeAlias

from msgspec import Struct, structs

from zppo.algorithm.composition import Composition, all_same, student_groups, without_failed
from zppo.algorithm.methods.base import Method
from zppo.algorithm.reformulations import Reformulator, merged
from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.algorithm.window import EVALUATE, TEACHER, Group, Reformulation, Visit, Window
from zppo.config.rewards import Part, parts_of
from zppo.config.topology import Topology
from zppo.data.question import Question
from zppo_protocol.values import Grade, share_of

CUT_OFF = "cut off"


class Recipe(Struct, frozen=True, kw_only=True):
    """A method with the numbers Algorithm 1 needs."""

    method: Method
    hard_threshold: float
    rho_replay: float
    rho_aug: float
    rho_aug_max: float | None
    teachers: int
    teacher_order: Literal["cascade", "pool"]
    merge_candidates: bool
    dynamic_sampling: bool
    seed: int
    zero_truncated: bool = False
    correct_reward: float = 1.0
    reward: tuple[Part, ...] = ()

    @classmethod
    def of(cls, topology: Topology, method: Method) -> Recipe:
        return cls(
            method=method,
            hard_threshold=topology.method.hard_threshold,
            rho_replay=topology.scheduler.rho_replay,
            rho_aug=topology.scheduler.rho_aug,
            rho_aug_max=topology.scheduler.rho_aug_max,
            teachers=1 + len(topology.more_teachers),
            teacher_order=topology.method.teacher_order,
            merge_candidates=topology.method.merge_candidates,
            dynamic_sampling=topology.method.dynamic_sampling,
            seed=topology.run.seed,
            zero_truncated=topology.method.truncated == "zero",
            correct_reward=topology.method.correct_reward,
            reward=tuple(parts_of(topology.data.reward)),
        )

    @property
    def part_names(self) -> list[str]:
        """Names of the parts of a reward, in their order."""
        return [part.name for part in self.reward]

    def replayed(self, new_questions: int) -> int:
        """⌊ρ_replay·|X_new|⌋, as many as X_replay holds when the buffer has them."""
        return share_of(self.rho_replay, new_questions) if self.method.replay else 0

    def reformulated(self, new_questions: int, hard_questions: int) -> int:
        """⌊ρ_aug·|X_new|⌋, the cap on reformulated groups. With `rho_aug_max`, ours, it follows the
        number of hard questions between the two."""
        least = share_of(self.rho_aug, new_questions)
        if self.rho_aug_max is None:
            return least
        return max(least, min(hard_questions, share_of(self.rho_aug_max, new_questions)))

    def rng(self, *where: object) -> random.Random:
        """A generator that depends only on the seed and the place it is used, so order of arrival
        cannot matter."""
        return random.Random("/".join(map(str, (self.seed, *where))))


def counted(group: Group, grades: list[Grade], recipe: Recipe) -> list[Grade]:
    """The grades of a group as they count: with `method.truncated: zero` a cut-off response of the
    student earns 0, and so does every part of its reward; one that would be right is undecided.
    An evaluation counts its responses as they are graded."""
    if group.kind in (TEACHER, EVALUATE) or not recipe.zero_truncated:
        return grades
    reasons = group.the_samples.finish_reasons
    return [
        structs.replace(
            grade,
            reward=0.0,
            note=grade.note or CUT_OFF,
            parts=dict.fromkeys(grade.parts, 0.0),
            undecided=grade.undecided or group.is_correct(grade),
        )
        if reason == "length"
        else grade
        for grade, reason in zip(grades, reasons, strict=True)
    ]


# ---- step 1 --------------------------------------------------------------------------------------


def draw_replayed(
    new: list[Question], buffer: ReplayBuffer, recipe: Recipe, window: int
) -> list[Question]:
    """X_replay of X = X_new ∪ X_replay: ρ_replay·|X_new| questions drawn uniformly from B, on top
    of X_new."""
    for question in new:
        buffer.hold(question.id)
    return buffer.draw(recipe.replayed(len(new)), recipe.rng(window, "replay"))


# ---- step 2 --------------------------------------------------------------------------------------


def is_hard(visit: Visit, recipe: Recipe) -> bool:
    """r̄_x < τ on the plain rollouts. A question none of whose rewards could be had is not: nothing
    is known of it."""
    return visit.plain.known and visit.accuracy < recipe.hard_threshold


def wants_teacher(visit: Visit, recipe: Recipe) -> bool:
    """Whether the teacher answers this question afresh now."""
    match recipe.method.teacher_draws:
        case "all":
            return True
        case "hard":
            return visit.plain.done and is_hard(visit, recipe)
        case "selected":
            return visit.selected
        case _:
            return False


def first_teacher(window: Window, visit: Visit, recipe: Recipe) -> int:
    """Which teacher is asked first: the first of a cascade, any one of a pool (ours; the paper has
    one)."""
    if recipe.teacher_order == "cascade":
        return 0
    return recipe.rng(window.index, visit.question.id, "teacher").randrange(recipe.teachers)


def asks_next_teacher(visit: Visit, recipe: Recipe) -> bool:
    """In a cascade: whether the last teacher had no correct response and there is another one."""
    last = visit.teacher
    if last is None or recipe.teacher_order != "cascade" or last.teacher + 1 >= recipe.teachers:
        return False
    return not last.indices(correct=True)


# ---- steps 3 to 5 --------------------------------------------------------------------------------


def select(window: Window, recipe: Recipe) -> list[Visit]:
    """X_aug of Algorithms 5 and 6: the hardest questions, on which alone the teacher is asked."""
    if recipe.method.teacher_draws != "selected":
        return []
    hard = hard_visits(window, recipe)
    chosen = hardest(hard, recipe.reformulated(window.new_count, len(hard)))
    for visit in chosen:
        visit.selected = True
    return chosen


def add_reformulations(window: Window, recipe: Recipe) -> None:
    """Decide the window's reformulated groups: pre-cap, post-cap, draw of the candidates."""
    hard = hard_visits(window, recipe)
    window.hard_questions = len(hard)
    limit = recipe.reformulated(window.new_count, len(hard))
    for visit, reformulator in post_cap(pre_cap(hard, recipe, limit), recipe, limit):
        candidates = reformulator.draw(
            visit, recipe.rng(window.index, visit.question.id, reformulator.kind)
        )
        if recipe.merge_candidates:
            candidates = merged(candidates)
        visit.reformulations.append(Reformulation(kind=reformulator.kind, candidates=candidates))


def hard_visits(window: Window, recipe: Recipe) -> list[Visit]:
    """All with r̄_x < τ, known once the window's plain groups are graded."""
    return [visit for visit in window.visits if is_hard(visit, recipe)]


def pre_cap(hard: list[Visit], recipe: Recipe, limit: int) -> list[Visit]:
    """The `limit` hardest base questions (ascending r̄_x) that admit at least one reformulation."""
    return hardest([visit for visit in hard if any(_admitted(visit, recipe))], limit)


def hardest(visits: list[Visit], limit: int) -> list[Visit]:
    """The first `limit` in ascending r̄_x; equal accuracies keep the order of the window."""
    return sorted(visits, key=lambda visit: visit.accuracy)[:limit]


def post_cap(
    visits: Iterable[Visit], recipe: Recipe, limit: int
) -> list[tuple[Visit, Reformulator]]:
    """Walk the questions in ascending r̄_x and add BCQ, then NCQ, of each; the one past the cap
    ends the walk."""
    walk = [(visit, reformulator) for visit in visits for reformulator in _admitted(visit, recipe)]
    return walk[:limit]


def _admitted(visit: Visit, recipe: Recipe) -> list[Reformulator]:
    return [r for r in recipe.method.reformulations if r.admits(visit)]


# ---- step 6 --------------------------------------------------------------------------------------


def compose(window: Window, recipe: Recipe) -> list[tuple[Visit, Composition]]:
    """The groups that enter the loss, in the order of the window. Rollouts whose reward failed are
    left out of them, so they count in no baseline.

    With `dynamic_sampling` (ours, in the order the authors suggest) a question is left out if all
    its groups came back all-same: only after BCQ and NCQ had their turn.
    """
    composed = []
    composer = recipe.method.composer
    # A generator takes longer to make than a group to compose, and this composer draws nothing.
    unused = random.Random(0) if composer is student_groups else None
    for visit in window.visits:
        rng = unused or recipe.rng(visit.window, visit.question.id, "compose")
        composed_of = composer(visit, rng)
        groups = [group for group in map(without_failed, composed_of) if group.members]
        if not (recipe.dynamic_sampling and all_same(groups)):
            composed += [(visit, group) for group in groups]
    return composed


FateName: TypeAlias = Literal["admitted", "graduated", "kept", "evicted", "none"]


class Fate(Struct, frozen=True, kw_only=True):
    """What a window did to one question. `visits` counts plain visits from admission to this
    one."""

    question_id: str
    fate: FateName
    entry_accuracy: float
    visits: int


def refresh_buffer(buffer: ReplayBuffer, window: Window, recipe: Recipe) -> list[Fate]:
    """Admit, graduate and evict, from plain rollouts only; reformulated rollouts never count."""
    if not recipe.method.replay:
        return []
    fates = [_refresh(buffer, visit, recipe, window.index) for visit in window.plain_visits]
    for entry in buffer.evict():
        fates.append(
            Fate(
                question_id=entry.question.id,
                fate="evicted",
                entry_accuracy=entry.entry_accuracy,
                visits=len(entry.visits),
            )
        )
    return fates


def _refresh(buffer: ReplayBuffer, visit: Visit, recipe: Recipe, step: int) -> Fate:
    question, accuracy = visit.question, visit.accuracy
    known = question.id in buffer
    if not visit.plain.known:  # nothing was learnt of it, so an entry stays as it was
        entry = buffer.put_back(question.id) if known else None
        return Fate(
            question_id=question.id,
            fate="kept" if known else "none",
            entry_accuracy=entry.entry_accuracy if entry else accuracy,
            visits=len(entry.visits) if entry else 1,
        )
    if not is_hard(visit, recipe):
        if not known:
            return Fate(question_id=question.id, fate="none", entry_accuracy=accuracy, visits=1)
        fate: FateName = "graduated"
        entry = buffer.graduate(question.id, accuracy, step)
    elif known:
        fate = "kept"
        entry = buffer.revisit(question.id, accuracy, step)
    else:
        fate = "admitted"
        entry = buffer.admit(question, accuracy, step)
    return Fate(
        question_id=question.id,
        fate=fate,
        entry_accuracy=entry.entry_accuracy,
        visits=len(entry.visits),
    )
