"""Filled batches against a reference that knows nothing of how they are filled, under disorder,
crashes and restores.

The reference (`Witness`) sees what actors were given and said, and what was sent to the trainer, and
reads all of it through at every question. What is trained of a window, over all steps, is compared
with the naive transcription of the method's algorithm.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from naive_windows import members, naive_run, oracle
from random_worlds import random_rates, random_topology, random_world
from reference import METHODS
from worlds import PROMPTS, Fake, World, questions, topology

from zppo.algorithm.composition import Composition, student_groups, with_teacher_response
from zppo.algorithm.methods import get_method, method_names
from zppo.algorithm.methods.base import Method
from zppo.algorithm.window import Group, Visit, Window
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.pacing import Pacer
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import waiting
from zppo_protocol import codec
from zppo_protocol.messages import GenerateTask, ScoreTask, TrainWindow
from zppo_protocol.values import seed_of, share_of

TRAINED_WHOLE = {"grpo_replay_teacher_response", "off_distill", "off_distill_replay"}
"""Methods whose composer looks at all groups of a question."""


class Witness(World):
    """A world that looks whether the promises are kept, at every instant."""

    opened: dict[int, Window]
    """Windows of which something is left."""
    settled: dict[int, tuple[int, Window]]
    """Window -> the step that trained the last of it, and the window as it was then."""

    given: dict[str, int]
    """Version of each task when it was last handed out."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.settled, self.given = {}, {}
        super().__init__(*arguments, **named)

    @property
    def splits(self) -> bool:
        """Whether a plain group may be trained before what is made of it."""
        config = self.topology.method
        return not (config.name in TRAINED_WHOLE or config.dynamic_sampling or self.scores_remotely)

    @property
    def bound(self) -> int:
        return self.topology.scheduler.max_staleness

    def build(self, state: SchedulerState | None) -> Scheduler:
        scheduler = super().build(state)
        self.opened = dict(scheduler.windows)
        return scheduler

    def restore(self) -> None:
        super().restore()
        count = len(self.steps)
        self.settled = {index: one for index, one in self.settled.items() if one[0] < count}

    def feed(self, event: events.Event) -> list[events.Outcome]:
        outcomes = super().feed(event)
        for outcome in outcomes:
            if isinstance(outcome, Assignment):
                job = outcome.job
                self.given[job.id] = job.min_version
                trains = job.pool == "rollout" and not job.id.endswith("/evaluate")
                assert not trains or job.min_version == self.scheduler.published, "the newest"
            if isinstance(outcome, events.Opened):
                self.opened[outcome.window.index] = outcome.window
            if isinstance(outcome, events.Trained):
                for index in outcome.settled:
                    self.settled[index] = outcome.window.index, self.opened.pop(index)
        if isinstance(event, events.Tick) and not any(
            isinstance(outcome, TrainWindow) for outcome in outcomes
        ):
            self.check_wait()
        return outcomes

    # ---- what is known ---------------------------------------------------------------------------

    def trained_ids(self) -> set[str]:
        sent = [*self.sent, *([self.shipped] if self.shipped else [])]
        return {group.group_id for window in sent for group in window.groups}

    def version(self, group: Group) -> int | None:
        """Of its oldest token, or of the task that an actor has; None: it has not begun."""
        if group.samples is not None:
            return int(group.samples.version_spans[:, 1].min())
        return self.given[group.id] if self.scheduler.dispatcher.holder(group.id) else None

    def left(self) -> Iterator[tuple[Visit, Group, int, bool]]:
        """(visit, group, version, whether all that has to come with it is there) of every group of
        the student that has begun and is not trained."""
        trained = self.trained_ids()
        for window in self.opened.values():
            decided = window.phase in ("reformulated", "composed")
            for visit in window.visits:
                made = [r.group for r in visit.reformulations]
                hard = visit.accuracy < self.topology.method.hard_threshold
                rest = all(g is not None and g.done for g in made) and (
                    decided or not hard or not self.method.reformulations
                )
                rest = rest and all(group.done for group in visit.teacher_groups())
                for group in [visit.plain, *(g for g in made if g is not None)]:
                    version = self.version(group)
                    if version is None or group.id in trained:
                        continue
                    there = visit.plain.done if group is visit.plain else rest
                    yield visit, group, version, there

    def new_left(self) -> list[tuple[int, bool]]:
        """(version, graded) of every new question that has begun and is not trained."""
        return [
            (version, there)
            for visit, group, version, there in self.left()
            if visit.origin == "new" and group is visit.plain
        ]

    def room(self, step: int, by: int) -> int:
        """New questions that the steps between can train."""
        sizes = {index: window.new_count for index, window in self.opened.items()}
        return sum(sizes.get(later, 0) for later in range(step + 1, by + 1))

    # ---- what is promised ------------------------------------------------------------------------

    def check_wait(self) -> None:
        """The trainer waits only where it has to."""
        scheduler, step = self.scheduler, self.scheduler.trained
        idle = scheduler.trainer_idle_since is not None and scheduler.training is None
        if (
            not idle
            or scheduler.drains
            or step not in self.opened
            or not self.splits
            or scheduler.stopping
        ):
            return
        wanted, new = self.opened[step].new_count, self.new_left()
        if sum(there for _, there in new) < wanted:
            return
        if any(v + self.bound <= step and not there for _, _, v, there in self.left()):
            return
        lag = 2 * (self.bound + 1)
        if any(index <= step - lag and not scheduler.ready(index) for index in self.opened):
            return
        for by in range(step, step + self.bound + 2):
            due = [there for version, there in new if version + self.bound <= by]
            if due.count(False) + max(0, due.count(True) - wanted) > self.room(step, by):
                return
        raise AssertionError(f"the trainer waits for nothing: {waiting(scheduler)}")

    def take_window(self, window: TrainWindow) -> None:
        super().take_window(window)  # keeps the bound, token by token
        step, batch = window.step, self.scheduler.in_trainer
        assert batch is not None
        new = [visit for visit in batch.visits if visit.origin == "new" and not visit.late]
        assert len(new) == self.opened[step].new_count, "as many new questions as its window has"
        lag = 2 * (self.bound + 1)
        assert all(step <= visit.window + lag for visit in batch.visits), "no window lags for ever"
        if not self.splits:
            return
        trained = [(v, g) for v in batch.visits for g in v.student_groups()]
        assert sorted(g.id for _, g in trained) == sorted(g.group_id for g in window.groups)
        oldest = [v for visit in new if (v := self.version(visit.plain)) is not None]
        left = [version for version, there in self.new_left() if there]
        assert not left or max(oldest) <= min(left), "the oldest questions first"
        assert all(v + self.bound > step for _, _, v, _ in self.left()), "too old later"
        for by in range(step + 1, step + self.bound + 2):
            due = sum(version + self.bound <= by for version, _ in self.new_left())
            assert due <= self.room(step, by), "more is due than steps can train"
        config = self.topology.scheduler
        regular = len(new) + share_of(config.rho_replay, len(new))
        regular += share_of(max(config.rho_aug, config.rho_aug_max or 0.0), len(new))
        due = [
            group
            for visit, group in trained
            if visit.late or visit.origin == "replay"
            if self.version(group) == step - self.bound or visit.window == step - lag
        ]
        whole = sum(len(visit.student_groups()) - 1 for visit in new)
        assert not any(index > step for index in self.opened) or (
            len(trained) <= max(regular, len(new) + whole) + len(due)
        ), "more than its share"


def check_windows(world: Witness) -> None:
    """What steps have trained of each window is what the algorithm trains of it."""
    sent: dict[int, list[Any]] = {}
    for group in (group for window in world.sent for group in window.groups):
        sent.setdefault(int(group.group_id.split("/")[0]), []).append(group)
    config = world.topology.scheduler
    for index, (_, settled) in sorted(world.settled.items()):
        visits = [structs.replace(visit, trained="nothing") for visit in settled.visits]
        window = Window(index=index, visits=visits)
        groups = sent.pop(index, [])
        trained = {group.group_id: members(window, group) for group in groups}
        assert len(trained) == len(groups), "a group is trained twice"
        new = [v.question.id for v in visits if v.origin == "new"]
        replayed = [v.question.id for v in visits if v.origin == "replay"]
        assert len(replayed) <= share_of(config.rho_replay, len(new))
        run = naive_run(world)
        run.order, run.new = [""] * (index * len(new)) + new, len(new)
        run.buffer, run.entry_accuracy = list(replayed), dict.fromkeys(replayed, 0.0)
        step = METHODS[world.method.name](run, index, oracle(window, trained))
        assert trained == step.trained
    assert not sent, "what is trained belongs to windows that are settled"


def run_to_its_end(world: Witness) -> None:
    world.run()
    new = [
        v.question.id for step in world.steps for v in step.window.plain_visits if v.origin == "new"
    ]
    epochs = world.topology.run.epochs
    assert Counter(new) == Counter([q.id for q in world.corpus] * epochs), "once a pass"
    assert [step.window.index for step in world.steps] == list(range(len(world.steps)))
    assert sorted(world.settled) == list(range(len(world.steps))) and not world.opened
    check_windows(world)


def filled_world(rng: random.Random, seed: int, method: str, bound: int, **rates: float) -> Witness:
    config = random_topology(rng, method, bound, "filled", epochs=rng.choice([1, 1, 2]))
    return random_world(rng, config, most_questions=20, seed=seed, kind=Witness, **rates)


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**9), bound=st.integers(1, 4), crash=st.sampled_from([0.0, 0.02, 0.1]))
def test_promises_are_kept_under_disorder_crashes_and_restores(
    method: str, seed: int, bound: int, crash: float
) -> None:
    rng = random.Random(seed)
    rates = random_rates(rng, crash)
    run_to_its_end(filled_world(rng, seed, method, bound, **rates))


def test_a_plain_group_is_trained_before_what_is_made_of_it() -> None:
    """And questions of later windows before slow ones of earlier ones."""
    late, mixed, accepted, counted = 0, 0, 0, 0
    for seed in range(20):
        world = filled_world(random.Random(seed), seed, "zppo", 2)
        run_to_its_end(world)
        late += sum(visit.late for step in world.steps for visit in step.window.visits)
        mixed += sum(v.window > s.window.index for s in world.steps for v in s.window.visits)
        accepted += len(set(world.dispatched))
        tasks = [step.window.tasks for step in world.steps]
        counted += sum(n for one in tasks for name, n in one.items() if name.startswith("answered"))
    assert late > 20 and mixed > 20
    assert counted == accepted, "each task is counted with one step"


def test_at_bound_0_filled_batches_are_windows() -> None:
    config = random_topology(random.Random(5), "zppo", 0, "filled")
    world = World(config, questions(12), seed=3).run()
    assert world.scheduler.batches == "windows"
    for step in world.steps:
        assert {visit.window for visit in step.window.visits} == {step.window.index}


def test_a_run_goes_on_with_what_it_began_with() -> None:
    """Without the setting; a state of before there was one went by windows."""
    unset = topology(scheduler={"max_staleness": 1})
    filled = topology(scheduler={"max_staleness": 1, "batches": "filled"})
    begun = World(filled, questions(4), seed=1).scheduler.state()
    assert World(unset, questions(4), seed=1).build(begun).batches == "filled"
    windows = World(unset, questions(4), seed=1).scheduler.state()
    assert windows.batches == "windows"
    assert World(filled, questions(4), seed=1).build(windows).batches == "filled"
    fields = {name: getattr(windows, name) for name in windows.__struct_fields__}
    del fields["batches"]
    assert SchedulerState(**fields).batches == "windows"


class Patient(Witness):
    """Nothing is trained or published while an actor still works, so a checkpoint has nothing in
    flight, but finished groups of many windows."""

    def happen(self, what: Any) -> None:
        if what in ("publish", "train") and any(actor.held for actor in self.actors.values()):
            return
        super().happen(what)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**9), bound=st.integers(1, 4), method=st.sampled_from(method_names()))
def test_a_resumed_run_is_the_run_that_never_stopped(seed: int, bound: int, method: str) -> None:
    def play(*, restored: bool) -> tuple[list[list[str]], bytes]:
        rng = random.Random(seed)
        config = random_topology(rng, method, bound, "filled")
        world = random_world(rng, config, most_questions=20, seed=seed, kind=Patient)
        while len(world.steps) < 2 and not world.scheduler.finished:
            world.turn()
        if restored:
            world.saved = (codec.dumps(world.scheduler.state()), len(world.steps))
            world.restore()
        for name in ("rollout-0", "rollout-1"):  # as they are after they have greeted anew
            world.happen(world.actors[name])
        world.rng = random.Random(seed)
        world.run()
        sent = [[group.group_id for group in window.groups] for window in world.sent]
        return sent, codec.dumps(world.scheduler.state())

    with pytest.MonkeyPatch.context() as patch:
        # The lead goes by seconds, of which a restored run has forgotten those before.
        patch.setattr(Pacer, "shipped", lambda *_: None)
        assert play(restored=True) == play(restored=False)


def test_after_a_redraw_nothing_is_left_of_what_was_not_trained() -> None:
    """The trainer dies on step 2 twice: what is trained stays, all else is sampled anew."""
    config = random_topology(random.Random(2), "zppo", 2, "filled")
    config = structs.replace(
        config,
        method=structs.replace(config.method, dynamic_sampling=False),
        scheduler=structs.replace(config.scheduler, new_questions=4, rho_aug=1.0, rho_aug_max=None),
    )
    world = Witness(config, questions(40), seed=4)
    while len(world.steps) < 2:
        world.turn()
    state = codec.dumps(world.scheduler.state())

    def restored(redraws: dict[int, int]) -> Scheduler:
        loaded = codec.loads(state, SchedulerState)
        return Scheduler(
            config, get_method("zppo"), world.corpus, [], PROMPTS, loaded, redraws=redraws
        )

    def sampled(scheduler: Scheduler) -> set[str]:
        visits = [v for w in scheduler.windows.values() for v in w.visits if v.trained != "all"]
        return {g.id for v in visits for g in v.student_groups() if g.samples is not None}

    assert sampled(restored({})) and sampled(restored({1: 1})), "step 1 is behind it"
    again = restored({2: 1})
    assert not sampled(again)
    assert again.trained == 2 and again.buffer.state() == restored({}).buffer.state()
    assert [w.index for w in again.windows.values()] == [
        w.index for w in restored({}).windows.values()
    ]
    world.scheduler, world.shipped = again, None
    world.opened = dict(again.windows)
    world.join_all()
    for assignment in world.assignments(world.now):
        world.receive(assignment)
        message = assignment.job.message
        assert isinstance(message, GenerateTask)
        assert message.seed != seed_of(config.run.seed, message.task_id)
    run_to_its_end(world)


def test_a_window_whose_scores_were_there_is_scored_anew_after_a_redraw() -> None:
    """One of its questions is trained; the trainer died twice on another."""
    config = topology(
        method={"name": "on_distill", "group_size": 2},
        teacher={"model": "teacher", "scoring": "remote"},
        scheduler={"new_questions": 3, "max_staleness": 1, "batches": "filled"},
    )
    world = World(config, questions(12), seed=4)
    while not world.scheduler.ready(0):
        world.turn()
    state = codec.loads(codec.dumps(world.scheduler.state()), SchedulerState)
    [window] = [window for window in state.windows if window.index == 0]
    window.visits[0].trained = "all"
    method = get_method("on_distill")
    again = Scheduler(config, method, world.corpus, [], PROMPTS, state, redraws={0: 1})
    assert again.missing[0] == {visit.plain.id for visit in window.visits[1:]}
    assert again.windows[0].visits[0].scores and not again.windows[0].visits[1].scores
    world.scheduler, world.shipped = again, None
    world.join_all()
    while not again.ready(0):
        world.turn()
    assert all(visit.scores for visit in again.windows[0].visits)


def test_a_hard_question_waits_for_the_choice_of_those_that_the_teacher_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A method of a user's that asks the teacher about the hardest and rewrites nothing."""
    method = Method(
        name="chosen",
        title="Chosen",
        summary="The teacher's response to the hardest questions.",
        teacher_draws="selected",
        composer=with_teacher_response,
        teacher_tokens=True,
    )
    monkeypatch.setattr("worlds.get_method", lambda name: method)
    config = topology(
        method={"group_size": 2, "teacher_group_size": 4, "hard_threshold": 1.0},
        scheduler={"new_questions": 3, "max_staleness": 2, "batches": "filled", "rho_aug": 1.0},
    )
    world = World(config, questions(30), seed=4, rewards=lambda name, n: [0.0] * n).run()
    visits = [visit for step in world.steps for visit in step.window.visits]
    assert len(visits) == 30 and all(visit.selected and visit.teacher for visit in visits)


def test_the_teacher_scores_the_rollouts_that_a_composer_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A method of a user's whose composer takes one rollout of each group by chance: a step that is
    not that of its window must draw the same ones, or scores are those of other tokens."""

    def one_of_each(visit: Visit, rng: random.Random) -> list[Composition]:
        groups = student_groups(visit, rng)
        return [structs.replace(one, members=[rng.choice(one.members)]) for one in groups]

    method = structs.replace(get_method("on_distill"), name="drawn", composer=one_of_each)
    monkeypatch.setattr("worlds.get_method", lambda name: method)
    config = topology(
        method={"name": "on_distill", "group_size": 4},
        scheduler={"new_questions": 2, "max_staleness": 3, "batches": "filled"},
        teacher={"scoring": "remote"},
    )
    world, scored = World(config, questions(12), seed=0), {}
    answer = world.answer

    def noted(actor: Fake, message: Any, versions: list[int]) -> events.Answer:
        if isinstance(message, ScoreTask):
            scored[message.task_id] = message.token_ids.tolist()
        return answer(actor, message, versions)

    monkeypatch.setattr(world, "answer", noted)
    world.run()
    visits = [(step.window, visit) for step in world.steps for visit in step.window.visits]
    assert any(visit.window != step.index for step, visit in visits)
    assert len(visits) == len(scored) == 12
    for step in world.sent:
        for group in step.groups:
            assert scored[f"{group.group_id}/score"] == group.samples.token_ids.tolist()


def test_waiting_says_what_for() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 2, "max_staleness": 1, "batches": "filled"},
    )
    world = World(config, questions(8), seed=4)
    world.assignments(0.0)
    assert waiting(world.scheduler)[0] == "the trainer waits for 2 more finished questions"
    while len(world.steps) < 3:
        world.turn()
    while not waiting(world.scheduler)[0].startswith("the trainer waits"):
        world.turn()
    rest = "the trainer waits for the rest of window 3"
    assert waiting(world.scheduler)[0] == rest
