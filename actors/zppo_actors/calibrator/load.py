"""Load on one engine: so many sequences at once, at several numbers, and what came of it as jobs.

Prompts are those of the corpus, so lengths are real. A burst has a limit of tokens that fits the
time that is left; responses that it cuts off tell the speed all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from msgspec import structs

from zppo.capacity.engine_curve import EngineRecord, Job
from zppo.data.question import Question
from zppo.errors import UserError
from zppo.prompting.prompts import PromptSet
from zppo.records.metrics import response_lengths
from zppo_actors.engines import Engine, EngineError
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Sampling

FIRST_TOKENS = 8
"""of the first bursts, which compile and warm up, and show how long a token step is"""
LEVELS = 4
"""Numbers of sequences below the capacity, each half of the one before."""
LENGTHS_SHARE = 0.5
"""Part of the time for the burst that shows how long responses are."""


class Answered:
    """The groups of the burst that ran with the full limit."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.samples: list[GroupSamples] = []
        self.cut_off = False
        """whether the time, not the topology, limited their lengths"""

    @property
    def lengths(self) -> list[list[int]]:
        return [[n for n in response_lengths(one) if n is not None] for one in self.samples]


class Loader:
    def __init__(
        self, engine: Engine, questions: Sequence[Question], prompts: PromptSet, group_size: int
    ) -> None:
        self.record = EngineRecord([], [])
        self._engine, self._prompts, self._size = engine, prompts, group_size
        self._questions, self._next = questions, 0

    async def run(self, sampling: Sampling, seconds: float) -> Answered:
        """Load the engine for about so long. Raises UserError if it cannot answer."""
        end = time.perf_counter() + seconds
        full = max(1, self._engine.capacity // self._size)
        short = min(FIRST_TOKENS, sampling.max_new_tokens)
        await self._burst(full, sampling, short)
        self.record.jobs.clear()  # it has warmed up
        step = await self._burst(full, sampling, short)
        limit = self._fitting(LENGTHS_SHARE * (end - time.perf_counter()), step, sampling)
        answered = Answered()
        step = await self._burst(full, sampling, limit, answered)
        answered.cut_off = limit < sampling.max_new_tokens and any(
            "length" in one.finish_reasons for one in answered.samples
        )
        groups = [full // 2**level for level in range(1, LEVELS + 1) if full >= 2**level]
        for left, count in enumerate(groups):
            part = (end - time.perf_counter()) / (len(groups) - left)
            step = await self._burst(count, sampling, self._fitting(part, step, sampling))
        return answered

    @staticmethod
    def _fitting(seconds: float, step: float, sampling: Sampling) -> int:
        """Tokens that a burst has time for."""
        return max(1, min(sampling.max_new_tokens, int(seconds / step)))

    async def _burst(
        self, groups: int, sampling: Sampling, limit: int, answered: Answered | None = None
    ) -> float:
        """So many groups at once; the seconds of a token step of the longest."""
        sampling = structs.replace(sampling, max_new_tokens=limit)
        chosen = [self._question() for _ in range(groups)]
        begin = time.perf_counter()
        found = await asyncio.gather(*(self._group(question, sampling) for question in chosen))
        seconds = time.perf_counter() - begin
        if answered is not None:
            answered.questions, answered.samples = chosen, found
        longest = max((job.lengths for job in self.record.jobs[-groups:]), key=max)
        return max(1e-6, seconds / max(1, *longest))

    async def _group(self, question: Question, sampling: Sampling) -> GroupSamples:
        task = GenerateTask(
            task_id=f"calibrate/{self._next}/{question.id}"[:200],
            kind="plain",
            prompt=self._prompts.plain(question),
            n=self._size,
            sampling=sampling,
            seed=self._next,
        )
        begin = time.perf_counter()
        try:
            samples = await self._engine.generate(task)
        except EngineError as error:
            raise UserError(f"--calibrate: the engine cannot answer: {error}") from None
        lengths = tuple(max(1, n or 1) for n in response_lengths(samples))
        self.record.jobs.append(Job(begin, time.perf_counter(), self._size, lengths))
        return samples

    def _question(self) -> Question:
        self._next += 1
        return self._questions[self._next % len(self._questions)]
