"""Work as the decode thread sees it, and how its outcome gets back into the caller's loop.

Invariant: a job is settled once, with a result or with a reason; once it is, nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from zppo.errors import UserError
from zppo.training.pictures import SeenPrompt
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.score_tasks import ScoreTable
from zppo_actors.engines.sequences import Completion, Running
from zppo_actors.engines.transformers.scoring import Scorer, passes
from zppo_actors.engines.uniforms import UniformStream
from zppo_protocol.messages import GenerateTask, ScoreTask

log = logging.getLogger("zppo.engine")


class Job:
    """One task; made in the loop of the caller, who awaits `future`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.settled = False

    def fail(self, error: EngineError | UserError) -> None:
        """Settle with a reason."""
        self.settle(error)

    def settle(self, outcome: Any) -> None:
        """Settle, with an EngineError, a UserError, or a result."""
        self.settled = True
        post(self.loop, resolve, self.future, outcome)


class SampleJob(Job):
    """A group being sampled; the future holds its list of completions."""

    def __init__(
        self,
        task: GenerateTask,
        prompt_ids: np.ndarray,
        budget: int,
        finished: Callable[[int], None],
        pictures: SeenPrompt | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.prompt_ids = prompt_ids
        self.budget = budget
        self.completions: list[Completion | None] = [None] * task.n
        self.admitted = 0
        self._finished = finished
        self._pictures = pictures

    def next_members(self, limit: int) -> list[Running]:
        """Up to `limit` sequences that have not been admitted yet."""
        members = range(self.admitted, min(self.admitted + limit, self.task.n))
        self.admitted = members.stop
        return [self._member(index) for index in members]

    def add(self, index: int, completion: Completion) -> None:
        """Note one finished sequence; the last one answers the caller."""
        if self.settled:
            return
        if not np.isfinite(completion.log_probs).all():
            self.fail(
                EngineError(
                    "the model gives probabilities that are not finite numbers", retryable=True
                )
            )
            return
        self.completions[index] = completion
        post(self.loop, self._finished, 1)
        if all(entry is not None for entry in self.completions):
            self.settle(self.completions)

    def _member(self, index: int) -> Running:
        uniforms = UniformStream(self.task.seed, index)
        return Running(
            self.prompt_ids,
            self.task.sampling,
            self.budget,
            index,
            uniforms,
            self.task.support_limit,
            self._pictures,
            owner=self,
        )


class ScoreJob(Job):
    """A task being scored, pass by pass; the future holds its TokenScores."""

    def __init__(self, task: ScoreTask) -> None:
        super().__init__()
        self.task = task
        self._left: deque[list[int]] | None = None
        self._table: ScoreTable | None = None

    def advance(self, scorer: Scorer) -> int:
        """Make the next pass, the last one answers the caller; returns how many tokens it
        scored."""
        if self._left is None or self._table is None:
            self._left = deque(passes(self.task, scorer.pass_tokens))
            self._table = ScoreTable(self.task, scorer.vocabulary)
        scored = 0
        if self._left:
            members = self._left.popleft()
            scorer.read(self.task, members, self._table)
            scored = int(np.diff(self.task.offsets)[members].sum())
        if not self._left:
            self.settle(self._table.scores())
        return scored


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Call in the loop's thread, if anybody is left there."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        log.debug("the caller's loop is closed; nobody waits for an answer")


def resolve(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give the future its result or its error, unless it was cancelled."""
    if future.done():
        return
    if isinstance(outcome, EngineError | UserError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
