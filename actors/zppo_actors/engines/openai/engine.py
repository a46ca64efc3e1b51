"""Teachers behind any server that speaks OpenAI's chat completions API: vLLM, SGLang, NIM, a hosted
service.

The engine sees text only, so its samples hold texts and what the server counted, and no token ids
or log-probs: it can sample, compress and judge, but neither be trained on nor score given tokens. A
task is answered or given back within `timeout_seconds` + `retry_seconds` of its last sign of life,
which the plan keeps below the lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from zppo.plan.engines.openai import (
    OpenAIArguments,
    read_key,
    read_openai_arguments,
    refuse_rollout,
)
from zppo.plan.server import check_server
from zppo_actors.engines.base import EngineError, EngineSpec
from zppo_actors.engines.openai.body import chat_messages, request_body
from zppo_actors.engines.openai.client import Client
from zppo_actors.engines.openai.reply import Reply
from zppo_actors.engines.openai.retry import Pauses, RequestFailed, RetryBudget
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import FROZEN, PolicyManifest, Usage

__all__ = ["OpenAIEngine", "create"]


log = logging.getLogger("zppo.engine")


def create(spec: EngineSpec) -> OpenAIEngine:
    """Check the arguments and the server. Raises UserError."""
    refuse_rollout(spec.served)
    arguments = read_openai_arguments(spec.served.actor.engine_args, spec.served.actor_path)
    key = read_key(arguments, f"{spec.served.actor_path}.engine_args")
    model = arguments.model or spec.served.model.model
    if arguments.check_model:
        patience = arguments.startup_seconds
        check_server(arguments, model, key, spec.served.actor_path, patience)
    return OpenAIEngine(arguments, model, key)


class Slots:
    """Room for so many completions at once; who asks for several gets them together, first come
    first served."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    async def take(self, count: int) -> None:
        taken = 0
        async with self._turn:
            try:
                for _ in range(count):
                    await self._free.acquire()
                    taken += 1
            except asyncio.CancelledError:
                self.give(taken)
                raise

    def give(self, count: int) -> None:
        for _ in range(count):
            self._free.release()


class OpenAIEngine:
    """See the module. `close` must be awaited to close the connections."""

    def __init__(
        self, arguments: OpenAIArguments, model: str, key: str | None, pauses: Pauses | None = None
    ) -> None:
        self._arguments = arguments
        self._model = model
        self._client = Client(arguments, key)
        self._pauses = pauses or Pauses()
        self._budget = RetryBudget(arguments.retry_budget)
        self._slots = Slots(arguments.max_concurrent)
        self._most = arguments.choices_per_request or arguments.max_concurrent
        self._progress = 0

    @property
    def capacity(self) -> int:
        return self._arguments.max_concurrent

    @property
    def policy_version(self) -> int:
        return FROZEN

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def broken(self) -> str | None:
        return None

    async def generate(
        self, task: GenerateTask, finished: Callable[[int], None] | None = None
    ) -> GroupSamples:
        """Sample `task.n` completions; `finished(k)` is called when a request for k of them is
        answered."""
        if task.n > self._slots.count:
            raise EngineError(
                f"{task.n} completions at once are more than max_concurrent, {self._slots.count}",
                retryable=False,
            )
        if task.prompt.start is not None:
            raise EngineError("a server cannot be told how a response begins", retryable=False)
        messages = await asyncio.to_thread(chat_messages, task.prompt)
        replies: list[Reply] = []
        missing = [range(task.n)]
        while missing:
            parts = [part for members in missing for part in self._parts(task, members)]
            answers = await _all(
                [self._part(task, messages, part, finished or _ignore) for part in parts]
            )
            replies += answers
            missing = [
                rest
                for part, answer in zip(parts, answers, strict=True)
                if (rest := part[len(answer.choices) :])
            ]
        return _text_samples(replies)

    async def score(self, task: ScoreTask) -> TokenScores:
        raise EngineError(
            "scoring needs an engine that can score: transformers or vllm", retryable=False
        )

    async def load_policy(self, manifest: PolicyManifest) -> str:
        raise EngineError("a model behind a server takes no new weights", retryable=False)

    async def close(self) -> None:
        await self._client.close()

    def _parts(self, task: GenerateTask, members: range) -> list[range]:
        """Members of the group in parts that one request each can ask for."""
        # Greedy completions are all the same, and vLLM refuses to make several of them in one
        # request.
        most = self._most if task.sampling.temperature > 0.0 else 1
        return [members[first : first + most] for first in range(0, len(members), most)]

    async def _part(
        self,
        task: GenerateTask,
        messages: list[dict[str, Any]],
        members: range,
        finished: Callable[[int], None],
    ) -> Reply:
        body = request_body(task, messages, self._arguments, self._model, members)
        reply = await self.ask(body, len(members), task.sampling.max_new_tokens)
        self._note_shortfall(len(reply.choices), len(members))
        finished(len(reply.choices))
        return reply

    async def ask(self, body: dict[str, Any], asked: int, tokens: int) -> Reply:
        """A request whose body is made already, for `asked` choices of at most `tokens` each.
        Raises EngineError."""
        await self._slots.take(asked)
        try:
            return await self._request(body, asked, tokens)
        finally:
            self._slots.give(asked)

    async def _request(self, body: dict[str, Any], asked: int, tokens: int) -> Reply:
        """One request with its retries. Raises EngineError, for another try where that may help."""
        until = time.monotonic() + self._arguments.retry_seconds
        retries, pause, trouble = 0, 0.0, "the server asks to wait"
        while await self._pauses.wait(pause, until):
            try:
                return await self._try(body, asked, tokens)
            except RequestFailed as failure:
                trouble = str(failure)
                self._judge(failure)
                pause = self._pauses.seconds(retries)
                retries += 1
        raise EngineError(f"{trouble} (after {retries} tries)", retryable=True)

    async def _try(self, body: dict[str, Any], asked: int, tokens: int) -> Reply:
        heard = 0

        def hear() -> None:
            nonlocal heard
            heard += 1
            self._progress += 1

        seconds = self._arguments.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                reply = await self._client.complete(body, asked, tokens, hear)
        except TimeoutError:
            # The time for it is spent: what is asked again would only wait longer for a server that
            # is slow.
            raise RequestFailed(f"no whole answer within {seconds:g} s", retryable=False) from None
        self._budget.worked()
        # A piece may be more than one token, and a reply that was not streamed comes in no pieces
        # at all.
        self._progress += max(0, (reply.completion_tokens or 1) - heard)
        return reply

    def _judge(self, failure: RequestFailed) -> None:
        """Return if the request may be tried again. Raises EngineError."""
        log.warning("a request failed: %s", failure)
        if failure.retry_after > 0.0:
            self._pauses.ask_for(failure.retry_after)
        if not failure.retryable:
            raise EngineError(str(failure), retryable=False)
        if not self._budget.take():
            raise EngineError(f"{failure} (and the retry budget is spent)", retryable=False)

    def _note_shortfall(self, got: int, asked: int) -> None:
        """Some servers make fewer choices than they are asked for, always: then more requests are
        made."""
        if got < asked and got < self._most:
            log.warning(
                "the server made %d of %d choices; it is asked for at most %d from now on",
                got,
                asked,
                got,
            )
            self._most = got


def _text_samples(replies: list[Reply]) -> GroupSamples:
    choices = [choice for reply in replies for choice in reply.choices]
    nothing = np.zeros(0, dtype=np.int32)
    return GroupSamples(
        prompt_ids=nothing,
        token_ids=nothing,
        log_probs=np.zeros(0, dtype=np.float32),
        offsets=np.zeros(len(choices) + 1, dtype=np.int32),
        version_spans=np.zeros((0, 2), dtype=np.int32),
        texts=[choice.text for choice in choices],
        finish_reasons=[choice.finish_reason for choice in choices],
        usage=[_usage(reply) for reply in replies],
    )


def _usage(reply: Reply) -> Usage:
    return Usage(
        completions=len(reply.choices),
        completion_tokens=reply.completion_tokens,
        prompt_tokens=reply.prompt_tokens,
    )


async def _all(requests: list[Coroutine[Any, Any, Reply]]) -> list[Reply]:
    """All replies in order; the first failure cancels the other requests and is raised."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ignore(count: int) -> None:
    """The caller does not want to know about single sequences."""
