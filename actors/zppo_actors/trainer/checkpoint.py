"""Where the ranks of a trainer begin from."""

from __future__ import annotations

from pathlib import Path

from zppo.errors import UserError
from zppo.records import checkpoint
from zppo_actors.process import ActorContext


def starting_checkpoint(context: ActorContext) -> Path | None:
    """Folder of the checkpoint that this attempt at the run begins from; None for a fresh student.

    Raises UserError if it is missing. Its bytes were verified when the run was resumed.
    """
    if context.start_version == 0:
        return None
    folder = checkpoint.final_folder(context.run_dir, context.start_version)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the checkpoint that the run should continue from does not exist"
        )
    return folder
