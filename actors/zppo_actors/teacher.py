"""The teacher actor: samples the frozen teacher. It loads no policy and opens for work when it is welcomed."""

from __future__ import annotations

from zppo.errors import UserError
from zppo_actors import engine_actor
from zppo_actors.process import ActorContext


def main(context: ActorContext) -> int:
    """Serve the teacher until told to leave; returns the exit code. Raises UserError."""
    topology = context.topology
    if topology.teacher is None:
        raise UserError("teacher: the topology has no such section, but a teacher actor was started")
    return engine_actor.run(context, topology.actors.teacher, topology.teacher, "teacher")
