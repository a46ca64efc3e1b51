"""The clock of who waited for whom, with peers that are set by hand."""

from __future__ import annotations

from zppo_actors.controller.peers import Peers
from zppo_actors.controller.status import StepClock
from zppo_actors.sampler.occupancy import Occupancy
from zppo_protocol.messages import PROTOCOL_VERSION, Hello

ROLES = {"rollout-0": "rollout", "grader-0": "grader", "grader-1": "grader"}


def peers() -> Peers:
    known = Peers("run", ROLES)
    for name, role in ROLES.items():
        known.add(
            name,
            Hello(
                protocol_version=PROTOCOL_VERSION,
                run_id="run",
                actor=name,
                role=role,  # type: ignore[arg-type]
                incarnation=0,
                pid=1,
                capacity=4,
            ),
            now=0.0,
        )
    return known


def test_graders_are_busy_when_every_one_has_work_and_each_beat_of_an_engine_counts_once() -> None:
    clock, known = StepClock(0.0), peers()
    rollout = known.get("rollout-0")
    assert rollout is not None
    held = {"grader-0": 3, "grader-1": 0}
    clock.sample(known, lambda name: held[name])
    held["grader-1"] = 1
    clock.sample(known, lambda name: held[name])
    for stats in ({"running": 3.0}, {"idle": 1.0}, {"idle": 0.25}):
        rollout.stats = stats
        clock.beat(rollout)
    assert clock.step_done(5.0) == {
        "time/trainer_wait": 0.0,
        "time/rollout_idle": (1.0 + 0.25) / 2,
        "time/grader_busy": 0.5,
    }
    clock.sample(Peers("run", {}), lambda name: 0)
    assert clock.step_done(6.0) == {"time/trainer_wait": 0.0}, "each step is measured afresh"


def test_a_beat_speaks_of_all_the_time_since_the_one_before() -> None:
    room = Occupancy(4, now=10.0)
    assert room.take_idle(10.0) is None, "no time has passed"
    room.holds(6, now=11.0)  # two of them wait
    room.holds(1, now=12.0)
    assert room.take_idle(14.0) == 1.0 - (4 * 1 + 1 * 2) / (4 * 4)
    assert room.take_idle(15.0) == 0.75, "one is still in hand"
    room.holds(0, now=15.0)
    assert room.take_idle(16.0) == 1.0
