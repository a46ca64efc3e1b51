"""The rollout actor: samples the student. It opens for work once it has loaded its first published
policy."""

from __future__ import annotations

from zppo.config.served import served_student
from zppo_actors.process import ActorContext
from zppo_actors.sampler import actor


def main(context: ActorContext) -> int:
    """Serve the student until told to leave; returns the exit code. Raises UserError."""
    return actor.run(context, served_student(context.topology))
