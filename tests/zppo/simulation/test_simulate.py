"""The simulator against what can be worked out without it, and against the scheduler's promises."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from worlds import topology

from zppo.algorithm.methods import get_method
from zppo.errors import UserError
from zppo.plan import make
from zppo.scheduling.dispatch import Job
from zppo.simulation import (
    Accuracies,
    Curve,
    Engines,
    Graders,
    Lengths,
    OutOfTime,
    Speeds,
    TrainerSpeed,
    World,
    simulate,
)
from zppo.simulation.chance import Chance
from zppo.simulation.machines import Engine
from zppo_protocol.messages import GradeTask


def world(bound: int, **changes: object) -> World:
    made = topology(
        scheduler={"max_staleness": bound, "new_questions": 8},
        actors={"rollout": {"count": 2}, "teacher": {"count": 1}, "grader": {"count": 2}},
    )
    engines = Engines(slots=16, curve=Curve(fixed=0.01, per_sequence=0.001), load_seconds=0.1)
    defaults: dict[str, object] = {
        "topology": made,
        "speeds": Speeds(
            rollout=engines,
            teachers=(engines,),
            trainer=TrainerSpeed(fixed=0.5, tokens_per_second=1e4, publish_seconds=0.1),
            grader=Graders(seconds=0.01),
        ),
        "lengths": Lengths(median=100.0, p99_ratio=8.0, cap=1000),
    }
    return World(**{**defaults, **changes})  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    starts=st.lists(st.integers(0, 40), min_size=12, max_size=12),
)
def test_an_engine_ends_sequences_when_token_by_token_it_would(
    lengths: list[int], starts: list[int]
) -> None:
    """Against a clock of small ticks that knows nothing of places and events."""
    curve = Curve(fixed=0.5, per_sequence=0.25)
    engine = Engine("e", "rollout", Engines(slots=16, curve=curve, prompt_steps=0.0), 0.0)
    begins = sorted(starts[: len(lengths)])
    ends: dict[str, float] = {}

    def until(time: float) -> None:
        while (end := engine.next_end()) is not None and end <= time:
            engine.advance(end)
            ends.update({held.job.id: end for held in engine.ended()})
        engine.advance(time)

    for index, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        until(float(begin))
        task = GradeTask(task_id=f"{index}", gold="1", responses=["1"], grader="math")
        engine.start(Job(id=f"{index}", pool="", order=(0,), cost=1, message=task), [length], 99)
    until(1e9)
    left, tick, now = dict(enumerate(map(float, lengths))), 1e-2, 0.0
    naive: dict[str, float] = {}
    while left:
        running = [i for i in left if begins[i] <= now + 1e-9]
        for i in running:
            left[i] -= tick / (0.5 + 0.25 * len(running))
        now += tick
        for i in [i for i in running if left[i] <= 1e-9]:
            naive[str(i)] = now
            del left[i]
    assert ends.keys() == naive.keys()
    assert max(abs(ends[i] - naive[i]) for i in ends) < 0.5


def test_a_synchronous_step_takes_what_can_be_added_up() -> None:
    """All right at once, so there is no teacher: one wave of 10 groups on 2 engines of 40 slots."""
    one = world(
        0,
        lengths=Lengths(values=(100,)),
        accuracies=Accuracies(values=(1.0,)),
        speeds=Speeds(
            rollout=Engines(
                slots=40, curve=Curve(fixed=0.01, per_sequence=0.001), load_seconds=0.25
            ),
            teachers=(Engines(slots=40, curve=Curve(fixed=0.01)),),
            trainer=TrainerSpeed(fixed=0.5, tokens_per_second=6400.0, publish_seconds=0.125),
        ),
    )
    run = simulate(one, 4, warm=1)
    sampling = 101 * (0.01 + 0.001 * 32)
    training = 0.5 + (8 * 8 * 100 + 8) / 6400.0 + 0.125
    assert run.seconds_per_step == pytest.approx(0.25 + sampling + training)
    assert run.trainer_wait == pytest.approx((0.25 + sampling) / run.seconds_per_step)
    assert run.work["trainer"] == pytest.approx(training)
    best = 101 * 64 / 2 * (0.01 + 0.001 * 40) / 40
    assert run.work["rollout"] == pytest.approx(0.25 + best)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(bound=st.integers(0, 4), seed=st.integers(0, 1000))
def test_the_bound_holds_and_no_step_beats_the_work_bound(bound: int, seed: int) -> None:
    run = simulate(world(bound), 12, seed)
    assert [step.step for step in run.steps] == list(range(12))
    assert run.staleness_max <= bound
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in run.busy.values())
    assert sum(step.groups.get("bcq", 0) + step.groups.get("ncq", 0) for step in run.steps) > 0
    assert msgspec.json.encode(run) == msgspec.json.encode(simulate(world(bound), 12, seed))
    if bound == 0:
        assert run.over_bound > 1.0


@pytest.mark.slow
def test_the_work_is_the_same_however_much_is_in_flight() -> None:
    """Of the windows that filled batches leave open the teacher's part is still to come."""
    scheduler = {"max_staleness": 8, "new_questions": 8, "batches": "filled"}
    actors = {"rollout": {"count": 2}, "teacher": {"count": 1}, "grader": {"count": 2}}
    slow = Engines(slots=16, curve=Curve(fixed=0.2))
    speeds = structs.replace(world(0).speeds, teachers=(slow,))
    filled = world(0, speeds=speeds, topology=topology(scheduler=scheduler, actors=actors))
    ahead, in_order = simulate(filled, 30, warm=0), simulate(world(0, speeds=speeds), 30, warm=0)
    for pool in ("rollout", "teacher", "grader"):
        assert ahead.work[pool] == pytest.approx(in_order.work[pool], rel=0.1), pool
    assert ahead.over_bound < 1.0, "the trainer has run ahead of the teacher"


def test_versions_change_where_weights_were_loaded() -> None:
    engine = Engine("e", "rollout", Engines(slots=1, curve=Curve(fixed=1.0), prompt_steps=0.0), 0.0)
    engine.loaded(0)
    task = GradeTask(task_id="t", gold="1", responses=["1"], grader="math")
    engine.start(Job(id="t", pool="", order=(0,), cost=1, message=task), [10], 99)
    engine.advance(4.0)
    engine.stand(6.0)
    engine.advance(6.0)
    engine.loaded(1)
    assert engine.next_end() == pytest.approx(12.0)
    engine.advance(12.0)
    [held] = engine.ended()
    np.testing.assert_array_equal(engine.samples(held, 3).version_spans, [[4, 0], [6, 1]])


def test_points_of_a_curve_are_joined() -> None:
    curve = Curve(points=((2, 1.0), (4, 2.0)))
    assert [curve.seconds(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.0, 1.5, 2.0, 3.0]
    assert curve.best_rate(4) == pytest.approx(2.0)


def test_a_curve_does_not_fall_past_its_last_point() -> None:
    curve = Curve(points=((1, 3.0), (8, 1.0)))
    assert [curve.seconds(n) for n in (1, 8, 64)] == [3.0, 1.0, 1.0]
    assert curve.best_rate(64) == 64.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"rollout": Engines(slots=7, curve=Curve(fixed=1.0))},
            "speeds.rollout.slots is 7; expected at least 8, method.group_size, because an engine "
            "samples a group at once",
        ),
        (
            {"teachers": (Engines(slots=3, curve=Curve(fixed=1.0)),)},
            "speeds.teachers[0].slots is 3; expected at least 4, method.teacher_group_size, "
            "because an engine samples a group at once",
        ),
        (
            {"teachers": ()},
            "speeds.teachers is missing; expected those of the topology's teachers, because the "
            "method asks them",
        ),
    ],
)
def test_a_world_in_which_a_job_waits_for_ever_is_refused(
    change: dict[str, Any], sentence: str
) -> None:
    made = world(1)
    with pytest.raises(UserError) as told:
        simulate(
            msgspec.structs.replace(made, speeds=msgspec.structs.replace(made.speeds, **change)), 2
        )
    assert str(told.value) == sentence


def test_an_evaluation_needs_room_for_its_samples_and_is_waited_for() -> None:
    made = msgspec.structs.replace(world(1), heldout=4)
    narrow = msgspec.structs.replace(made.speeds.rollout, slots=8)
    topology = msgspec.structs.replace(
        made.topology, evaluation=msgspec.structs.replace(made.topology.evaluation, samples=9)
    )
    speeds = msgspec.structs.replace(made.speeds, rollout=narrow)
    with pytest.raises(UserError, match=r"at least 9, evaluation\.samples"):
        simulate(msgspec.structs.replace(made, topology=topology, speeds=speeds), 2)
    assert len(simulate(made, 2).steps) == 2


@settings(max_examples=8, deadline=None)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_values_are_drawn_as_they_are_and_together(share: float, seed: int) -> None:
    """Each value is as probable as the other; all responses to a question are equal where the
    length belongs to the question alone."""
    values = tuple(range(1, 11))
    law = Lengths(values=tuple(reversed(values)), of_question=share)
    chance = Chance(world(0, lengths=law), seed)
    groups = [chance.lengths(f"0/q{i}/plain", "plain", 4, 99) for i in range(1000)]
    counts = np.bincount(np.concatenate(groups), minlength=11)[1:]
    assert counts.sum() == 4000 and abs(counts - 400).max() < 180
    if share == 1.0:
        assert all(len(set(group)) == 1 for group in groups)
    limited = chance.lengths("0/q0/plain", "plain", 4, 3)
    assert limited == [min(3, length) for length in groups[0]]


def test_patience_ends_a_simulation() -> None:
    looks = iter([False] * 50)
    with pytest.raises(OutOfTime):
        simulate(world(1), 4, out_of_time=lambda: next(looks, True))


def test_no_filled_batch_is_larger_than_planned() -> None:
    """The teacher is so slow that all that it was asked for is left for the last step."""
    one = topology(
        method={"group_size": 2, "teacher_group_size": 2},
        scheduler={
            **{"new_questions": 4, "max_staleness": 1, "batches": "filled"},
            **{"rho_aug": 1.0, "rho_replay": 0.0},
        },
    )
    world = World(
        topology=one,
        speeds=Speeds(
            rollout=Engines(slots=64, curve=Curve(fixed=0.01)),
            teachers=(Engines(slots=2, curve=Curve(fixed=1.0)),),
            trainer=TrainerSpeed(fixed=0.1, tokens_per_second=1e5),
        ),
        lengths=Lengths(values=(20,)),
        accuracies=Accuracies(values=(0.2,)),
        corpus=4 * 12,
        ends=True,
    )
    steps = simulate(world, 12).steps
    planned = make._windows(one, get_method("zppo"), 4 * 12)
    bytes_of_a_group = 2 * one.student.sampling.max_new_tokens * make.BYTES_PER_TOKEN
    largest = max(sum(step.groups.values()) for step in steps)
    assert largest > 4 * 5 and largest * bytes_of_a_group <= planned.largest_bytes


def test_a_budget_does_not_end_a_simulation() -> None:
    made = world(1)
    limited = topology(
        scheduler={"max_staleness": 1, "new_questions": 8},
        teacher={"model": "teacher", "budget": {"requests": 3}},
        actors={"rollout": {"count": 2}, "teacher": {"count": 1}, "grader": {"count": 2}},
    )
    spent = simulate(msgspec.structs.replace(made, topology=limited), 3)
    assert spent.seconds_per_step == simulate(made, 3).seconds_per_step
