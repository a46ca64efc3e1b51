"""The controller's part of a checkpoint: the scheduler's state at one step, joined with the
trainer's share.

Order of things: a step is trained, the state of that very moment is kept here and the trainer is
asked for its share; when the share is written, state, records and manifest follow on the background
thread and the folder gets its name. Records are forced to the disk first: a checkpoint is never
ahead of its journal.

A share or a file that cannot be written (a full disk) costs this checkpoint only: what lies there
of it is removed, the problem is kept for the controller to say, and the next one is a new try.
"""

from __future__ import annotations

import logging

from zppo.records import checkpoint
from zppo.records.binding import MadeWith
from zppo.scheduling.scheduler import RunFailure
from zppo.scheduling.state import SchedulerState
from zppo_actors.controller.file_thread import Background
from zppo_actors.controller.recorder import Recorder
from zppo_actors.process import ActorContext
from zppo_protocol import codec

log = logging.getLogger("zppo.controller")


class Checkpointer:
    """`saved` is the newest step whose checkpoint is whole on the disk."""

    def __init__(
        self,
        context: ActorContext,
        recorder: Recorder,
        background: Background,
        made_with: MadeWith,
    ) -> None:
        self.saved = context.start_version
        self.waiting_for: int | None = None
        self._run_dir, self._keep = context.run_dir, context.topology.checkpoints.keep
        self._recorder, self._background = recorder, background
        self._made_with = made_with
        self._state = b""
        self.failures = 0
        """Checkpoints in a row that could not be written, and the problem of the last one."""
        self.problem = ""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint has been begun and is not whole yet."""
        return self.waiting_for is not None or not self._background.idle

    def begin(self, step: int, state: SchedulerState) -> None:
        """Keep the scheduler as it is after `step` trained steps, until the trainer's share is
        there."""
        self.waiting_for, self._state = step, codec.dumps(state)

    def share_written(self, step: int) -> None:
        """The trainer's share lies in the partial folder: complete the checkpoint."""
        if step != self.waiting_for:
            raise RunFailure(f"the trainer saved step {step}, which nobody asked for")
        self.waiting_for = None
        self._recorder.check_place()
        self._recorder.journal.sync()
        self._background.submit(self._complete, step, self._state)

    def failed(self, step: int, reason: str) -> None:
        """The trainer could not write its share."""
        if step == self.waiting_for:
            self.waiting_for = None
            self._note(step, reason)

    def _note(self, step: int, reason: str) -> None:
        self.failures += 1
        self.problem = f"the checkpoint of step {step} cannot be written: {reason}"

    def _complete(self, step: int, state: bytes) -> None:
        partial = checkpoint.partial_folder(self._run_dir, step)
        try:
            checkpoint.write_file(partial / checkpoint.SCHEDULER, state)
            self._recorder.sinks.sync()
            checkpoint.commit(self._run_dir, step, self._made_with)
        except OSError as error:
            checkpoint.discard(self._run_dir, step)
            self._note(step, str(error))
            return
        self.saved, self.failures = step, 0
        try:
            checkpoint.prune(self._run_dir, self._keep, newest=step)
        except OSError as error:  # the new one is whole; the next prune finds what is left
            log.warning("an older checkpoint cannot be removed: %s", error)
