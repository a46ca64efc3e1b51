"""The rollout actor: samples the student. It opens for work once it has loaded its first published
policy."""

from __future__ import annotations

from zppo_actors.process import ActorContext
from zppo_actors.sampler import actor


def main(context: ActorContext) -> int:
    """Serve the student until told to leave; returns the exit code. Raises UserError."""
    topology = context.topology
    rollout, student = topology.actors.rollout, topology.student
    return actor.run(context, rollout, student, "rollout", "actors.rollout", "student.model")
