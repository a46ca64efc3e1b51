"""How a run ends: finished, stopped for a reason, or out of a teacher's budget; and what has to be
on the disk before.

Finished: every step is trained, evaluated and saved. Stopped: nothing new is begun, the trainer is
idle, its last step saved. A run that ends because its budget is spent also waits for what the
teachers have in hand, and saves it: it has been paid for.
"""

from __future__ import annotations

from collections.abc import Callable

from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED, count_of
from zppo.scheduling import events
from zppo.scheduling.scheduler import RunFailure, Scheduler
from zppo.scheduling.waiting import out_of_budget, teachers_at_work
from zppo_actors.controller.checkpointer import Checkpointer
from zppo_actors.controller.recorder import Recorder
from zppo_protocol.messages import RunEnded

SAVE_AGAIN_SECONDS = 10.0
LAST_TRIES = 6
"""Tries to write the last checkpoint of a run before it ends without one."""


class Ending:
    """`save` begins a checkpoint of the scheduler as it is."""

    def __init__(
        self,
        scheduler: Scheduler,
        checkpointer: Checkpointer,
        recorder: Recorder,
        save: Callable[[], None],
    ) -> None:
        self._scheduler, self._checkpointer = scheduler, checkpointer
        self._recorder, self._save = recorder, save
        self._reason: str | None = None
        self._code = EXIT_INTERRUPTED
        self._paid_for = False
        """Whether answers of teachers are worth a checkpoint of their own."""
        self._save_again, self._failures_said, self._last_tries = 0.0, 0, 0

    def stop(self, reason: str, exit_code: int) -> None:
        """Begin nothing new; the run ends once its last step is saved. The first reason stays."""
        if self._reason is None:
            self._reason, self._code = reason, exit_code
            self._scheduler.handle(events.StopAsked())

    def look(self, now: float, remark: str) -> RunEnded | None:
        """The last word if the run is at its end, with `remark` behind that of a finished one.
        Raises RunFailure if the last checkpoint cannot be written."""
        self._say_failed_checkpoint(now)
        self._heed_budget()
        if self._checkpointer.busy or self._scheduler.training is not None:
            return None
        stopped = self._reason is not None
        if not stopped and not self._scheduler.finished:
            return None
        if self._checkpointer.saved < self._scheduler.trained:
            if now >= self._save_again:
                self._try_last_save()
            return None
        if self._paid_for:
            self._keep_paid()
            return None
        steps = f"{self._scheduler.trained} of {count_of(self._scheduler.total_steps, 'step')}"
        if stopped:
            verdict = f"{self._reason}: {steps} are trained and saved"
            return RunEnded(verdict=verdict, exit_code=self._code)
        return RunEnded(verdict=f"finished: {steps}{remark}", exit_code=0)

    def _heed_budget(self) -> None:
        problem = out_of_budget(self._scheduler) if self._reason is None else None
        if problem is not None:
            self.stop(problem, EXIT_FAILED)
            self._paid_for = self._scheduler.trained > 0

    def _keep_paid(self) -> None:
        """Save once more when the teachers have answered; their leases bound the wait."""
        if not teachers_at_work(self._scheduler):
            self._paid_for = False
            self._save()

    def _try_last_save(self) -> None:
        """The run ends here, so there is no later checkpoint to wait for."""
        if self._last_tries >= LAST_TRIES:
            raise RunFailure(self._checkpointer.problem)
        self._last_tries += 1
        self._save()

    def _say_failed_checkpoint(self, now: float) -> None:
        """Training goes on without a checkpoint that could not be written; the last one of a run is
        tried again for a while."""
        if self._checkpointer.failures > self._failures_said:
            self._save_again = now + SAVE_AGAIN_SECONDS
            self._recorder.event("controller", "no_checkpoint", self._checkpointer.problem)
        self._failures_said = self._checkpointer.failures
