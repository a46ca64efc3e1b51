"""The events are all there is: a log of them, written and read back, leads to the same state."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import random_rates, random_topology, random_world
from worlds import World, questions, topology

from zppo.algorithm.methods import method_names
from zppo.config.topology import Batches
from zppo.scheduling import events
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import waiting
from zppo_protocol import codec
from zppo_protocol.values import Grade


class Life(msgspec.Struct):
    """One scheduler from its start: what it was told and what came of it, as bytes, because windows
    change later."""

    state: bytes | None
    began: float
    events: list[bytes] = msgspec.field(default_factory=list)
    outcomes: list[bytes] = msgspec.field(default_factory=list)


def record(world: World) -> list[Life]:
    """Keep all that the world's schedulers are told from now on; a restore begins another life."""
    lives: list[Life] = []
    feed, build = world.feed, world.build

    def recorded_feed(event: events.Event) -> list[events.Outcome]:
        lives[-1].events.append(codec.dumps(event))
        outcomes = feed(event)
        lives[-1].outcomes.append(codec.dumps(outcomes))
        return outcomes

    def recorded_build(state: SchedulerState | None) -> Scheduler:
        lives.append(Life(codec.dumps(state) if state is not None else None, world.now))
        return build(state)

    world.feed, world.build = recorded_feed, recorded_build  # type: ignore[method-assign]
    world.scheduler = world.build(None)
    world.join_all()
    return lives


def replayed(world: World, life: Life, check: Callable[[int, bytes], None]) -> Scheduler:
    """A scheduler that is told the events of a life; `check` sees what comes of each."""
    state = codec.loads(life.state, SchedulerState) if life.state is not None else None
    scheduler = Scheduler(
        world.topology,
        world.method,
        world.corpus,
        world.heldout,
        world.scheduler.prompts,
        state,
        life.began,
    )
    for number, data in enumerate(life.events):
        event: Any = codec.loads(data, events.Event)  # type: ignore[arg-type]
        check(number, codec.dumps(scheduler.handle(event)))
    return scheduler


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    method=st.sampled_from(method_names()),
    batches=st.sampled_from(["windows", "filled"]),
)
def test_a_log_of_events_replays_to_the_same_state_and_outcomes(
    seed: int, method: str, batches: Batches
) -> None:
    rng = random.Random(seed)
    rates = random_rates(rng, rng.choice([0.0, 0.05]))
    config = random_topology(rng, method, rng.randint(0, 3), batches)
    world = random_world(rng, config, most_questions=12, seed=seed, **rates)
    lives = record(world)
    for _ in range(rng.choice([100, 100_000])):
        if world.scheduler.finished:
            break
        world.turn()
    for life in lives:

        def check(number: int, outcomes: bytes, life: Life = life) -> None:
            assert outcomes == life.outcomes[number]

        again = replayed(world, life, check)
    assert codec.dumps(again.state()) == codec.dumps(world.scheduler.state())
    assert waiting(again) == waiting(world.scheduler)


def test_nothing_comes_of_what_nobody_waits_for() -> None:
    world = World(topology(method={"name": "grpo"}), questions(2), seed=1)
    before = codec.dumps(world.scheduler.state())
    unknown = events.Graded(
        task_id="9/q9/plain/grade", actor="x", incarnation=0, grades=[], now=0.0
    )
    assert world.feed(unknown) == []
    assert world.feed(unknown.as_failure("no")) == []
    assert world.feed(events.Heard(actor="x", tasks=["a"], now=0.0)) == []
    assert world.feed(events.ActorLeft(actor="x")) == []
    assert codec.dumps(world.scheduler.state()) == before


def test_an_answer_of_another_kind_is_a_failed_try() -> None:
    """Grades for a group that is to be sampled: as many as asked for, yet no samples."""
    config = topology(method={"name": "grpo", "group_size": 2}, scheduler={"new_questions": 1})
    world = World(config, questions(1), seed=4)
    [given] = world.assignments(0.0)
    reply: dict[str, Any] = {"task_id": given.job.id, "actor": given.worker, "incarnation": 0}
    assert not world.accepts(events.Graded(grades=[Grade(reward=1.0)] * 2, now=0.0, **reply))
    world.grant(given.worker, 2)
    [again] = world.assignments(0.0)
    assert again.job.id == given.job.id
    assert world.scheduler.dispatcher.attempts(given.job.id) == 2
    assert world.scheduler.windows[0].visits[0].plain.grades is None
