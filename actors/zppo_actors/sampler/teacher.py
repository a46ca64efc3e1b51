"""The teacher actor: samples the frozen teacher. It loads no policy and opens for work when it is
welcomed."""

from __future__ import annotations

from zppo.config.served import teachers
from zppo.errors import UserError
from zppo_actors.process import ActorContext
from zppo_actors.sampler import actor


def main(context: ActorContext) -> int:
    """Serve the teacher whose pool this actor is in until told to leave; returns the exit code.
    Raises UserError."""
    pool = context.actor.rpartition("-")[0]
    served = next((one for one in teachers(context.topology) if one.pool == pool), None)
    if served is None:
        raise UserError(
            f"teacher: the topology has no teacher for the actor {context.actor!r}, but it was "
            "started"
        )
    return actor.run(context, served)
