"""Where the ranks of a trainer begin from."""

from __future__ import annotations

from pathlib import Path

from zppo.errors import UserError
from zppo.records import checkpoint
from zppo.records.run_directory import read
from zppo_actors.process import ActorContext


def starting_checkpoint(context: ActorContext, run_dir: Path | None = None) -> Path | None:
    """Folder of the checkpoint that this attempt at the run begins from; None for a fresh student.
    It lies in the `run_dir` that the first rank names, if this is a rank of another host.

    Raises UserError if it is missing. Its bytes were verified when the run was resumed.
    """
    if context.start_version == 0:
        return None
    folder = checkpoint.final_folder(run_dir or context.run_dir, context.start_version)
    if run_dir is not None and not _is_of_this_attempt(run_dir, context.run_id):
        raise UserError(
            f"{folder}: the checkpoint that the run should continue from is not on this host; "
            "trainer ranks on several hosts need run.directory on a file system that they share, "
            "under one path"
        )
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the checkpoint that the run should continue from does not exist"
        )
    return folder


def _is_of_this_attempt(run_dir: Path, run_id: str) -> bool:
    """Another run may lie under the same path of another host."""
    try:
        return read(run_dir).run_id == run_id
    except (UserError, OSError):
        return False
