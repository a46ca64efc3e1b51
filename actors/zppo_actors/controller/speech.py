"""What each role may say to the controller, and what an answer is to the scheduler."""

from __future__ import annotations

from typing import Any

from zppo.scheduling import events
from zppo_actors.controller.peers import Peer
from zppo_protocol import messages

WORKER_SPEAKS = (messages.Heartbeat, messages.Credits, messages.TaskFailed, messages.Goodbye)
ENGINE_SPEAKS = (*WORKER_SPEAKS, messages.GenerateResult)
SPEAKS: dict[str, tuple[type, ...]] = {
    "rollout": (*ENGINE_SPEAKS, messages.PolicyLoaded, messages.PolicyRefused),
    "teacher": (*ENGINE_SPEAKS, messages.ScoreResult),
    "grader": (*WORKER_SPEAKS, messages.GradeResult),
    "trainer": (
        messages.Heartbeat,
        messages.Credits,
        messages.PolicyPublished,
        messages.StepTrained,
        messages.CheckpointSaved,
        messages.CheckpointFailed,
        messages.Goodbye,
    ),
    "weights": (
        messages.Heartbeat,
        messages.WeightSource,
        messages.PolicyLoaded,
        messages.PolicyRefused,
        messages.Goodbye,
    ),
    "supervisor": (messages.ActorExited, messages.ActorsMoving, messages.StopRequested),
}
"""What each role may say after its Hello; anything else is logged and ignored."""


def answer_of(
    message: messages.GenerateResult | messages.ScoreResult | messages.GradeResult,
    peer: Peer,
    now: float,
) -> events.Answer:
    """What a worker says of its task, as an event."""
    reply: dict[str, Any] = {
        "task_id": message.task_id,
        "actor": peer.name,
        "incarnation": peer.incarnation,
        "now": now,
    }
    match message:
        case messages.GenerateResult():
            return events.Sampled(samples=message.samples, **reply)
        case messages.ScoreResult():
            return events.Scored(scores=message.scores, **reply)
        case messages.GradeResult():
            return events.Graded(grades=message.grades, **reply)
