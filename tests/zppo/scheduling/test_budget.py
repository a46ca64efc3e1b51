"""The teacher's budget against a count of what fake teachers were asked and said, under crashes of
actors and of the controller."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from random_worlds import random_topology
from worlds import PROMPTS, World, questions, topology

from zppo.algorithm.methods import get_method, method_names
from zppo.config.topology import Batches, TeacherBudget, Topology
from zppo.data.question import Question
from zppo.plan.make import _windows
from zppo.plan.teacher_work import covered_steps, teacher_work
from zppo.scheduling import events
from zppo.scheduling.budget import Spent
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import out_of_budget, teachers_at_work
from zppo_protocol import codec
from zppo_protocol.messages import ScoreTask
from zppo_protocol.values import Usage

BATCHES = st.sampled_from(["windows", "filled"])
WORK = {"teacher": "draw", "compress": "compress", "write_hint": "hint", "judge": "judge"}


def with_budget(config: Topology, **limits: int | None) -> Topology:
    assert config.teacher is not None
    teacher = structs.replace(config.teacher, budget=TeacherBudget(**limits))  # type: ignore[arg-type]
    return structs.replace(config, teacher=teacher)


def work_of(message: Any) -> str:
    return "score" if isinstance(message, ScoreTask) else WORK[message.kind]


class PaidWorld(World):
    """Teachers count what they were asked and what they said: (requests, tokens) by kind of work.
    `journal` is what the controller would have written down; neither goes back in a crash."""

    def __init__(self, config: Topology, corpus: list[Question], **rates: Any) -> None:
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.in_windows: Counter[tuple[str, str]] = Counter()
        self.journal: dict[str, Spent] = {}
        self.failed: set[str] = set()
        super().__init__(config, corpus, **rates)

    def build(self, state: SchedulerState | None) -> Scheduler:
        return Scheduler(
            self.topology,
            self.method,
            self.corpus,
            self.heldout,
            PROMPTS,
            state,
            self.now,
            spent=self.journal,
        )

    @property
    def spent_up(self) -> bool:
        assert self.topology.teacher is not None
        limits = self.topology.teacher.budget
        return (limits.requests or 10**9) <= self.requests.total() or (
            limits.tokens or 10**9
        ) <= self.tokens.total()

    def feed(self, event: events.Event) -> list[events.Outcome]:
        outcomes = super().feed(event)
        for cost in outcomes:
            if isinstance(cost, events.Cost):
                spent = self.journal.setdefault(cost.kind, Spent())
                spent.requests += cost.requests
                spent.tokens += cost.tokens
        return outcomes

    def receive(self, assignment: Assignment) -> None:
        if self.actors[assignment.worker].role == "teacher":
            assert not self.spent_up, "a teacher was asked although the budget is spent"
            work = work_of(assignment.job.message)
            self.requests[work] += 1
            self.in_windows[assignment.job.id.split("/")[0], work] += 1
        super().receive(assignment)

    def answer(self, actor: Any, message: Any, versions: list[int]) -> events.Answer:
        """A server counts two requests for a group of more than one."""
        event = super().answer(actor, message, versions)
        if not isinstance(event, events.Sampled) or not event.samples.text_only:
            return event
        shares = [1, message.n - 1] if message.n > 1 else [1]
        usage = [Usage(completions=n, completion_tokens=3 * n, prompt_tokens=7) for n in shares]
        samples = structs.replace(event.samples, usage=usage)
        return structs.replace(event, samples=samples)

    def finish(self, actor: Any, task_id: str) -> None:
        message = actor.held[task_id].job.message
        super().finish(actor, task_id)
        # What failed was given back and is asked again; what was answered is not known any more.
        if actor.role != "teacher" or task_id in self.failed:
            self.failed.discard(task_id)
            return
        work = work_of(message)
        if work == "score":
            self.tokens[work] += len(message.prompt_ids) + len(message.token_ids)
        elif self.text_only_teachers:
            self.tokens[work] += 3 * message.n + (14 if message.n > 1 else 7)
            self.requests[work] += message.n > 1
        else:
            self.tokens[work] += 2 + 2 * message.n

    def fail(self, actor: Any, task_id: str, reason: str, *, retryable: bool) -> None:
        super().fail(actor, task_id, reason, retryable=retryable)
        self.failed.add(task_id)

    def live(self) -> bool:
        """Go on to the end of the run, or of the budget; whether it was that of the run."""
        for _ in range(100_000):
            if self.scheduler.finished:
                return True
            if out_of_budget(self.scheduler) is not None:
                return False
            self.turn()
        raise AssertionError("the run does not end")

    def go_on_with(self, **limits: int | None) -> None:
        """End in order, as the controller does, and resume with another budget."""
        self.feed(events.StopAsked())
        while teachers_at_work(self.scheduler):
            self.turn()
        self.saved = (codec.dumps(self.scheduler.state()), len(self.steps))
        self.topology = with_budget(self.topology, **limits)
        self.restore()

    def check(self) -> None:
        counted = {kind: (s.requests, s.tokens) for kind, s in self.scheduler.budget.spent.items()}
        wanted = {kind: (n, self.tokens[kind]) for kind, n in self.requests.items()}
        assert counted == wanted
        assert self.journal == self.scheduler.budget.spent


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    method=st.sampled_from([m for m in method_names() if get_method(m).needs_teacher]),
    batches=BATCHES,
)
def test_what_is_counted_is_what_teachers_were_asked_and_said(
    seed: int, method: str, batches: Batches
) -> None:
    rng = random.Random(seed)
    config = random_topology(rng, method, rng.randint(0, 3), batches)
    corpus = [
        structs.replace(q, answer=f"gold {q.id}", grader="judge") if rng.random() < 0.3 else q
        for q in questions(rng.randint(1, 10))
    ]
    tokens_matter = get_method(method).teacher_tokens or get_method(method).needs_scores
    name, step = rng.choice([("requests", 6), ("tokens", 60)])
    limit = rng.randint(1, step)
    world = PaidWorld(
        with_budget(config, **{name: limit}),
        corpus,
        seed=seed,
        text_only_teachers=not tokens_matter and rng.random() < 0.5,
        crash_rate=rng.choice([0.0, 0.05]),
        failure_rate=rng.choice([0.0, 0.1]),
    )
    while not world.live():
        world.check()
        assert world.spent_up
        limit = getattr(world, name).total() + step
        world.go_on_with(**{name: limit})
    world.check()
    visits = [v for trained in world.steps for v in trained.window.plain_visits]
    new = [v.question.id for v in visits if v.origin == "new"]
    assert sorted(new) == sorted(question.id for question in corpus)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    method=st.sampled_from([m for m in method_names() if get_method(m).needs_teacher]),
    judged=st.booleans(),
    batches=BATCHES,
)
def test_no_window_asks_for_more_than_the_plan_says(
    seed: int, method: str, judged: bool, batches: Batches
) -> None:
    rng = random.Random(seed)
    config = random_topology(rng, method, rng.randint(0, 3), batches)
    corpus = questions(rng.randint(1, 10))
    if judged:
        config = structs.replace(config, data=structs.replace(config.data, grader="judge"))
        corpus = [structs.replace(q, answer=f"gold {q.id}", grader="judge") for q in corpus]
    world = PaidWorld(config, corpus, seed=seed)
    assert world.live()
    value = get_method(method)
    planned = teacher_work(config, value, _windows(config, value, len(corpus)))
    most = {work.kind: work.requests for work in planned}
    for (_, work), requests in world.in_windows.items():
        assert requests <= most[work]


def test_the_plan_in_longhand() -> None:
    """Two teachers in a cascade, 8 new and 2 replayed questions, 4 rewritten prompts; groups of 4
    and 2, lengths 100 (question), 50 (student), 60 and 70 (teachers), 30 (compressed)."""
    config = topology(
        data={"max_prompt_tokens": 100},
        method={"name": "zppo", "group_size": 4, "teacher_group_size": 2},
        scheduler={"new_questions": 8, "rho_replay": 0.25, "rho_aug": 0.5},
        student={"sampling": {"max_new_tokens": 50}},
        teacher={
            "sampling": {"max_new_tokens": 60},
            "compression_sampling": {"max_new_tokens": 30},
            "budget": {"tokens": 50_000},
        },
        more_teachers=[
            {"model": "m", "sampling": {"max_new_tokens": 70}, "actor": {"engine": "openai"}}
        ],
    )
    works = teacher_work(config, get_method("zppo"), _windows(config, get_method("zppo"), 80))
    draws = 10 * (100 + 2 * 60) + 10 * (100 + 2 * 70)
    compressions = 4 * 4 * (100 + 70 + 512 + 30)
    assert [(w.kind, w.requests, w.tokens) for w in works] == [
        ("draw", 20, draws),
        ("compress", 16, compressions),
    ]
    assert covered_steps(config, works) == 50_000 // (draws + compressions) == 3


def test_a_run_that_needs_no_teacher_any_more_goes_on() -> None:
    """Both windows are open; the teacher is asked about the first alone, and its last answer is the
    one that spends the budget."""
    config = topology(
        method={"name": "zppo", "group_size": 2, "teacher_group_size": 1},
        scheduler={"new_questions": 1, "max_staleness": 0, "rho_aug": 0.0, "rho_replay": 0.0},
    )
    hard = {"q0", "q1"}

    def rewards(group_id: str, n: int) -> list[float]:
        return [float(group_id.split("/")[1] not in hard)] * n

    world = PaidWorld(with_budget(config, requests=2), questions(4), seed=3, rewards=rewards)
    assert world.live()
    assert world.requests == {"draw": 2} and len(world.steps) == 4


def test_the_sentence_and_where_it_ends() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 2, "teacher_group_size": 1},
        scheduler={"new_questions": 1, "max_staleness": 0, "rho_aug": 0.0, "rho_replay": 0.0},
    )
    world = PaidWorld(
        with_budget(config, requests=2), questions(4), seed=3, rewards=lambda _, n: [0.0] * n
    )
    assert not world.live()
    assert len(world.steps) == 2
    assert out_of_budget(world.scheduler) == (
        "the teacher's budget is spent: 2 requests of 2 (teacher.budget.requests; raise it to go "
        "on)"
    )
