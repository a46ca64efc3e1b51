"""The clock of who waited for whom, with peers that are set by hand."""

from __future__ import annotations

from zppo_actors.controller.peers import Peers
from zppo_actors.controller.status import StepClock
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


def test_graders_are_busy_when_every_one_has_work_and_engines_idle_by_slots() -> None:
    clock, known = StepClock(0.0), peers()
    rollout = known.get("rollout-0")
    assert rollout is not None
    held = {"grader-0": 3, "grader-1": 0}
    clock.sample(known, lambda name: held[name])
    held["grader-1"] = 1
    rollout.stats = {"running": 3.0}
    clock.sample(known, lambda name: held[name])
    assert clock.step_done(5.0) == {
        "time/trainer_wait": 0.0,
        "time/rollout_idle": (1.0 + 0.25) / 2,
        "time/grader_busy": 0.5,
    }
    assert clock.step_done(6.0) == {"time/trainer_wait": 0.0}, "each step is measured afresh"
