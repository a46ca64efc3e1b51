"""The scheduler's invariants under disorder, crashes and restores, for every method."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import random_rates, random_topology, random_world
from worlds import PROMPTS, World, questions, samples, scripted_rewards, topology

from zppo.algorithm.methods import method_names
from zppo.config.topology import Batches
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.scheduler import RunFailure, Scheduler
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import waiting
from zppo_protocol import codec
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import seed_of, share_of


def check_run(world: World) -> None:
    """What must be true of any finished run."""
    config, windows = world.topology.scheduler, [trained.window for trained in world.steps]
    assert [w.index for w in windows] == list(range(len(windows)))
    new = [v.question.id for w in windows for v in w.visits if v.origin == "new"]
    epochs = world.topology.run.epochs
    assert sorted(new) == sorted([q.id for q in world.corpus] * epochs), (
        "each question exactly once per pass"
    )
    for window in windows:
        replayed = sum(v.origin == "replay" for v in window.visits)
        augmented = sum(len(v.reformulations) for v in window.visits)
        assert replayed <= share_of(config.rho_replay, window.new_count)
        assert augmented <= share_of(
            max(config.rho_aug, config.rho_aug_max or 0.0), window.new_count
        )
        assert len({v.question.id for v in window.visits}) == len(window.visits)
    assert len(world.scheduler.buffer) <= config.buffer_capacity
    assert [sent.step for sent in world.sent] == list(range(len(windows))), (
        "what was sent is what was trained"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), bound=st.integers(0, 4), crash=st.sampled_from([0.0, 0.02, 0.1]))
def test_invariants_hold_under_disorder_crashes_and_restores(
    method: str, seed: int, bound: int, crash: float
) -> None:
    rng = random.Random(seed)
    rates = random_rates(rng, crash)
    world = random_world(
        rng, random_topology(rng, method, bound), most_questions=20, seed=seed, **rates
    )
    check_run(world.run())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), epochs=st.integers(2, 3))
def test_every_pass_over_the_corpus_sees_each_question_once(seed: int, epochs: int) -> None:
    rng = random.Random(seed)
    config = random_topology(rng, "zppo", rng.randint(0, 3), epochs=epochs)
    check_run(World(config, questions(rng.randint(1, 12)), seed=seed, crash_rate=0.02).run())


def test_replay_is_full_when_the_buffer_is() -> None:
    config = topology(
        method={"name": "grpo_replay", "group_size": 2},
        scheduler={"new_questions": 4, "rho_replay": 0.5, "max_staleness": 0},
    )
    world = World(config, questions(40), seed=1, rewards=lambda group, n: [0.0] * n).run()
    replayed = [sum(v.origin == "replay" for v in t.window.visits) for t in world.steps]
    assert replayed == [0, *[2] * 9]


def test_a_run_repeats_exactly() -> None:
    def groups(seed: int) -> list[list[str]]:
        config = random_topology(random.Random(5), "zppo", 2)
        world = World(config, questions(12), seed=seed, rewards=scripted_rewards(3)).run()
        return [[g.id for g in t.window.student_groups()] for t in world.steps]

    assert groups(8) == groups(8)


def test_without_staleness_order_of_arrival_does_not_matter() -> None:
    def prompts(seed: int) -> list[str]:
        config = topology(
            method={"name": "zppo", "group_size": 4},
            scheduler={"new_questions": 5, "rho_replay": 0.5, "rho_aug": 1.0, "max_staleness": 0},
        )
        world = World(
            config, questions(20), seed=seed, rewards=scripted_rewards(3, difficulty=0.7)
        ).run()
        return [
            g.prompt.messages[-1].content for t in world.steps for g in t.window.student_groups()
        ]

    first = prompts(1)
    assert any("candidate" in prompt for prompt in first)
    assert first == prompts(2)


def test_a_resumed_run_is_the_run_that_never_stopped() -> None:
    def prompts(restores: int) -> list[str]:
        config = topology(
            method={"name": "zppo", "group_size": 4},
            scheduler={"new_questions": 5, "rho_replay": 1.0, "rho_aug": 1.0, "max_staleness": 0},
            evaluation={"every": 2},
        )
        world = World(
            config,
            questions(40),
            seed=1,
            rewards=scripted_rewards(3, 0.7),
            heldout=questions(2, "h"),
        )
        for done in range(restores):
            while len(world.steps) <= done * 2 or world.saved is None:
                world.turn()
            world.restore()
        world.run()
        assert [e.step for e in world.evaluations] == [0, 2, 4, 6, 8]
        return [
            g.prompt.messages[-1].content for t in world.steps for g in t.window.student_groups()
        ]

    assert prompts(restores=0) == prompts(restores=3)


def test_heldout_is_evaluated_before_during_and_after() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 2, "max_staleness": 1},
        evaluation={"every": 3, "samples": 2},
    )
    world = World(config, questions(16), seed=3, heldout=questions(5, "h")).run()
    steps = [e.step for e in world.evaluations]
    assert steps[0] == 0 and steps[-1] == 8 and len(steps) >= 3
    assert world.evaluations[0].questions == 5 and world.evaluations[0].samples == 10
    trained = {v.question.id for t in world.steps for v in t.window.visits}
    assert not trained & {q.id for q in world.heldout}


def test_the_first_evaluation_comes_before_any_window() -> None:
    config = topology(method={"name": "grpo"}, scheduler={"new_questions": 2})
    world = World(config, questions(4), seed=3, heldout=questions(2, "h"))
    kinds = {a.job.message.kind for a in world.assignments(0.0)}
    assert kinds == {"evaluate"}
    assert not world.scheduler.windows


def test_stop_keeps_windows_in_flight_for_the_next_life() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 2, "max_staleness": 2}
    )
    world = World(config, questions(20), seed=4)
    while len(world.steps) < 2:
        world.turn()
    open_windows = sorted(world.scheduler.windows)
    world.feed(events.StopAsked())
    for _ in range(50):
        world.turn()
    assert open_windows and sorted(world.scheduler.windows) == open_windows
    assert world.feed(events.Tick(now=world.now)) == []
    resumed = world.build(world.scheduler.state())
    assert sorted(resumed.windows) == sorted(world.scheduler.windows)
    assert resumed.trained == world.scheduler.trained


def test_a_task_that_keeps_killing_its_workers_ends_the_run() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 1, "max_attempts": 3}
    )
    world = World(config, questions(3), seed=4)
    with pytest.raises(
        RunFailure, match=r"task 0/q\d/plain failed 3 times: its worker was lost each time"
    ):
        for _ in range(10):
            for assignment in world.assignments(0.0):
                world.feed(events.ActorLeft(actor=assignment.worker))
            for name in ("rollout-0", "rollout-1"):
                world.feed(events.ActorJoined(actor=name, pool="rollout", incarnation=1))
                world.feed(events.PolicyLoaded(actor=name, version=0))
                world.grant(name, 8)


def test_a_task_that_keeps_hanging_its_workers_ends_the_run() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 1, "max_attempts": 3, "lease_seconds": 10.0},
    )
    world = World(config, questions(1), seed=4)
    with pytest.raises(
        RunFailure,
        match=r"task 0/q0/plain failed 3 times: its worker made no progress, last rollout-\d",
    ):
        for now in range(0, 100, 20):
            world.assignments(float(now))
            world.feed(events.LeaseCheck(now=now + 15.0))
            world.grant("rollout-0", 2)
            world.grant("rollout-1", 2)


def test_a_lost_task_is_done_by_another_although_its_worker_is_busy() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 1, "lease_seconds": 10.0},
    )
    world = World(config, questions(1), seed=4)
    ((first,), lost) = (world.assignments(0.0), "0/q0/plain")
    world.feed(events.Progressed(actor=first.worker, now=9.0))
    assert world.heard(first.worker, [], 9.0) == [], "it may be on its way"
    world.feed(events.Progressed(actor=first.worker, now=12.0))
    assert world.heard(first.worker, [lost], 12.0) == [], "it says that it has it"
    [stuck] = world.feed(events.Heard(actor=first.worker, tasks=["another"], now=12.0))
    reason = "it lost 1 of its tasks, first 0/q0/plain"
    assert stuck == events.WorkerStuck(actor=first.worker, tasks=[lost], reason=reason)
    assert [a.job.id for a in world.assignments(12.0)] == [lost]


def test_a_plain_prompt_that_no_engine_can_take_ends_the_run_with_its_reason() -> None:
    config = topology(method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 1})
    world = World(config, questions(1), seed=4)
    (assignment,) = world.assignments(0.0)
    reason = "prompt of 900 tokens, the context has 512"
    with pytest.raises(RunFailure, match="task 0/q0/plain cannot be done: prompt of 900 tokens"):
        world.receive(assignment)
        world.fail(world.actors[assignment.worker], assignment.job.id, reason, retryable=False)


def refuse(world: World, kind: str, *, retryable: bool = False) -> None:
    """Whoever gets a task of this kind says that it cannot be done, or not this time."""
    original = world.finish

    def finish(actor: Any, task_id: str) -> None:
        message = actor.held[task_id].job.message
        if getattr(message, "kind", None) != kind:
            original(actor, task_id)
            return
        world.fail(actor, task_id, "too long", retryable=retryable)

    world.finish = finish  # type: ignore[method-assign]


def speechless(world: World, name: str) -> None:
    """What this teacher answers to a question has no final answer, which is wrong without a
    judge."""
    original = world.answer

    def answer(actor: Any, message: Any, versions: list[int]) -> events.Answer:
        event = original(actor, message, versions)
        if actor.name != name or not isinstance(event, events.Sampled) or message.kind != "teacher":
            return event
        drawn = msgspec.structs.replace(event.samples, texts=["no idea"] * message.n)
        return msgspec.structs.replace(event, samples=drawn)

    world.answer = answer  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["bcq", "ncq", "teacher", "compress"])
def test_the_teacher_and_rewritten_prompts_can_be_done_without(kind: str) -> None:
    config = topology(
        method={"name": "zppo", "group_size": 2},
        scheduler={"new_questions": 3, "rho_aug": 1.0},
    )
    world = World(config, questions(9), seed=4, rewards=lambda g, n: [float("teacher" in g)] * n)
    refuse(world, kind)
    check_run(world.run())
    kinds = {g.kind for t in world.steps for g in t.window.student_groups()}
    lost = {"bcq": {"bcq"}, "ncq": {"ncq"}, "teacher": {"bcq"}, "compress": set()}[kind]
    assert kinds == {"plain", "bcq", "ncq"} - lost


def test_a_window_counts_what_became_of_its_tasks() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 2},
        scheduler={"new_questions": 3, "rho_aug": 1.0},
    )
    world = World(config, questions(9), seed=4, rewards=lambda g, n: [float("teacher" in g)] * n)
    refuse(world, "teacher")
    for trained in world.run().steps:
        visits, tasks = trained.window.visits, trained.window.tasks
        asked = sum(visit.teacher is not None for visit in visits)
        written = {
            (visit.question.id, c.index)
            for visit in visits
            for reformulation in visit.reformulations
            for c in reformulation.candidates
        }
        groups = len(trained.window.student_groups())
        assert asked and tasks == {
            "given_up/teacher": asked,
            "failed/teacher/teacher-0": asked,
            "answered/teacher": len(written),
            "answered/rollout": groups,
            "answered/grader": groups,
        }


def test_every_failed_try_counts_and_the_last_one_gives_up() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 2, "teacher_group_size": 1},
        scheduler={"new_questions": 1, "max_attempts": 3},
    )
    world = World(config, questions(1), seed=4, rewards=lambda g, n: [0.0] * n)
    refuse(world, "teacher", retryable=True)
    [trained] = world.run().steps
    assert trained.window.tasks["failed/teacher/teacher-0"] == 3
    assert trained.window.tasks["given_up/teacher"] == 1


def test_free_form_answers_are_graded_by_the_judge() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 4, "teacher_group_size": 2},
        scheduler={"new_questions": 4, "rho_aug": 1.0},
    )
    corpus = [
        msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge") for q in questions(8)
    ]
    world = World(config, corpus, seed=6, crash_rate=0.05)
    check_run(world.run())
    for trained in world.steps:
        for group in trained.window.student_groups():
            assert group.rewards.tolist() == world.rewards(group.id, 4)
    assert any(v.reformulations for t in world.steps for v in t.window.visits)


def test_without_faults_every_task_is_handed_out_once() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 4},
        scheduler={"new_questions": 4, "rho_aug": 1.0},
    )
    corpus = [
        msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge") for q in questions(4)
    ]
    world = World(config, [*corpus, *questions(4, "p")], seed=6).run()
    kinds = {task.split("/")[2] for task in world.dispatched}
    assert kinds >= {"plain", "teacher", "compress", "bcq", "ncq"}
    assert any("/judge-" in task for task in world.dispatched)
    assert len(set(world.dispatched)) == len(world.dispatched)


def test_a_response_whose_judge_failed_keeps_its_answer_and_is_not_shown_as_wrong() -> None:
    config = topology(
        method={"name": "grpo_replay_ncq", "group_size": 2},
        scheduler={"new_questions": 2, "rho_aug": 1.0},
    )
    corpus = [
        msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge") for q in questions(2)
    ]
    world = World(config, corpus, seed=4, rewards=lambda g, n: [0.0] * n)
    refuse(world, "judge")
    window = world.run().steps[0].window
    grades = [grade for visit in window.visits for grade in visit.plain.grades or []]
    assert {grade.note for grade in grades} == {"the judge failed: too long"}
    assert all(grade.answer for grade in grades)
    assert window.hard_questions == 2
    assert [group.kind for group in window.student_groups()] == ["plain", "plain"]


def test_a_teacher_whose_answers_need_no_judge_hands_on_to_the_next_one() -> None:
    """Hint asks teachers in its last phase before it decides: the next one must be asked at
    once."""
    config = topology(
        method={"name": "hint", "group_size": 2, "teacher_group_size": 2},
        scheduler={"new_questions": 2, "rho_aug": 1.0},
        more_teachers=[{"model": "another"}],
    )
    corpus = [
        msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge") for q in questions(2)
    ]
    world = World(config, corpus, seed=4, rewards=lambda g, n: [float("-2" in g)] * n)
    speechless(world, "teacher-0")
    [window] = [trained.window for trained in world.run().steps]
    for visit in window.visits:
        assert [group.teacher for group in visit.teacher_groups()] == [0, 1]
        assert [r.kind for r in visit.reformulations] == ["hint"]


def test_a_window_that_is_drawn_again_has_nothing_left_and_other_seeds() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 2, "max_staleness": 2},
    )
    world = World(config, questions(8), seed=4)
    while len(world.scheduler.windows) < 2 or not all(map(world.scheduler.ready, (0, 1))):
        world.turn()
        world.shipped = None  # the trainer never comes to an end
    state = codec.dumps(world.scheduler.state())

    def seeds(redraws: dict[int, int]) -> dict[str, int]:
        scheduler = Scheduler(
            config, world.method, world.corpus, [], PROMPTS, codec.loads(state, SchedulerState),
            redraws=redraws,
        )  # fmt: skip
        scheduler.handle(events.ActorJoined(actor="engine", pool="rollout", incarnation=0))
        scheduler.handle(events.PolicyLoaded(actor="engine", version=0))
        scheduler.handle(events.Granted(actor="engine", count=100))
        jobs = [o.job for o in scheduler.handle(events.Tick(now=0.0)) if isinstance(o, Assignment)]
        return {job.id: job.message.seed for job in jobs if job.id.startswith(("0/", "1/"))}

    asked = {visit.plain.id for visit in world.scheduler.windows[1].visits}
    assert seeds({}) == {}, "everything is there"
    once, again, twice = seeds({1: 1}), seeds({1: 1}), seeds({1: 2})
    assert set(once) == set(twice) == asked and once == again
    for job in asked:
        assert len({once[job], twice[job], seed_of(config.run.seed, job)}) == 3


@pytest.mark.parametrize("parts", [1, 3])
def test_an_answer_with_the_wrong_number_of_parts_is_a_failed_try(parts: int) -> None:
    config = topology(method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 1})
    world = World(config, questions(1), seed=4)
    (assignment,) = world.assignments(0.0)
    message = assignment.job.message
    assert isinstance(message, GenerateTask)
    answer = samples(msgspec.structs.replace(message, n=parts), [0, 0])
    assert not world.accepts(
        events.Sampled(
            task_id=message.task_id, actor=assignment.worker, incarnation=0, samples=answer, now=0.0
        )
    )
    world.grant(assignment.worker, 2)
    (again,) = world.assignments(0.0)
    assert again.job.id == message.task_id


def test_waiting_names_who_waits_for_whom() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 2, "max_staleness": 0}
    )
    world = World(config, questions(6), seed=4)
    world.assignments(0.0)
    assert waiting(world.scheduler) == [
        "the trainer waits for window 0",
        "window 0 waits for 2 plain (rollout-0, rollout-1)",
        "window 1 waits for step 0 (staleness bound)",
    ]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    method=st.sampled_from(method_names()),
    batches=st.sampled_from(["windows", "filled"]),
)
def test_exactly_what_is_missing_is_asked_for(seed: int, method: str, batches: Batches) -> None:
    """At every moment of a run, and whoever asks how often."""
    rng = random.Random(seed)
    rates = {"crash_rate": 0.02, "failure_rate": rng.choice([0.0, 0.1])}
    config = random_topology(rng, method, rng.randint(0, 3), batches)
    world = random_world(rng, config, most_questions=8, seed=seed, **rates)
    if rng.random() < 0.5:
        world.corpus[::2] = [
            msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge")
            for q in world.corpus[::2]
        ]
        world.scheduler = world.build(None)
        world.join_all()
    while not world.scheduler.finished:
        world.turn()
        before = codec.dumps(world.scheduler.state())
        for index, window in world.scheduler.windows.items():
            missing = {target.task_id for target in world.scheduler.stages.missing(window)}
            assert missing == world.scheduler.missing[index]
        assert codec.dumps(world.scheduler.state()) == before, "looking changes nothing"
