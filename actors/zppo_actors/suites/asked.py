"""A model behind a server, asked with one decoding, whose answers are kept in a journal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from msgspec import Struct

from zppo.grading.boxes import last_boxed
from zppo.plan.engines.openai import OpenAIArguments, read_key
from zppo.plan.server import check_server
from zppo.suites.table import Decoding
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_actors.suites.journal import Answer, Journal
from zppo_protocol.values import seed_of

HOPELESS = 3
"""So many questions in a row that cannot be asked mean that the server is at fault, not they."""
SEEDS = 2**31
JUDGE_DECODING = Decoding(
    max_new_tokens=512, temperature=0.0, top_p=1.0, top_k=0, presence_penalty=0.0
)
"""Of the shared judge (appendix B.2)."""


class ModelGone(RuntimeError):
    """A server does not answer any more; the message is one sentence. The suite stops."""


class Counts(Struct, kw_only=True):
    """What was asked of a model for one row."""

    answers: int = 0
    replayed: int = 0
    """of these, taken from the journal"""
    tokens: int = 0
    counted: int = 0
    """answers whose tokens the server counted"""
    cut_off: int = 0
    unboxed: int = 0
    """without an answer in a box"""
    refused: int = 0
    """questions that the server would not take; they count as wrong"""


class AskedModel:
    """`who` is how sentences name it, `model` its name at the server; `identity` tells it from
    other models of that name, whose answers may lie in the same journal."""

    def __init__(
        self,
        who: str,
        model: str,
        arguments: OpenAIArguments,
        decoding: Decoding,
        seed: int,
        journal: Journal,
        identity: str = "",
    ) -> None:
        key = read_key(arguments, who)
        self.who = who
        self.model = model
        self.counts = Counts()
        self._url = arguments.base_url
        self._decoding = decoding
        self._seed = seed
        self._identity = identity or model
        self._journal = journal
        self._engine = OpenAIEngine(arguments, model, key)
        self._asked: Counter[str] = Counter()
        self._refused_in_a_row = 0

    async def close(self) -> None:
        await self._engine.close()
        self._journal.close()

    async def ask(self, messages: list[dict[str, Any]]) -> Answer:
        """The answer to a conversation; the n-th time that the same is asked, the n-th answer.
        Raises ModelGone."""
        body = {"model": self.model, "messages": messages, **_fields(self._decoding)}
        asked = [self._identity, self._seed, body]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
        key = f"{digest}/{self._asked[digest]}"
        self._asked[digest] += 1
        answer = self._journal.get(key)
        if answer is not None:
            self.counts.replayed += 1
        else:
            answer = await self._answer(key, body)
        self._count(answer)
        return answer

    async def _answer(self, key: str, body: dict[str, Any]) -> Answer:
        tokens = self._decoding.max_new_tokens
        seeded = {**body, "seed": seed_of(self._seed, key) % SEEDS, "stream": True}
        seeded["stream_options"] = {"include_usage": True}
        try:
            reply = await self._engine.ask(seeded, 1, tokens)
        except EngineError as error:
            return self._refused(key, error)
        self._refused_in_a_row = 0
        choice = reply.choices[0]
        answer = Answer(
            key=key,
            text=choice.text,
            cut_off=choice.finish_reason == "length",
            tokens=reply.completion_tokens,
        )
        self._journal.add(answer)
        return answer

    def _refused(self, key: str, error: EngineError) -> Answer:
        """An empty answer for a question that cannot be asked, which the journal does not keep.
        Raises ModelGone where the server is at fault."""
        self._refused_in_a_row += 1
        if error.retryable or self._refused_in_a_row >= HOPELESS:
            raise ModelGone(f"{self.who} at {self._url} does not answer: {error}") from None
        self.counts.refused += 1
        return Answer(key=key, text="", cut_off=False, tokens=0)

    def _count(self, answer: Answer) -> None:
        self.counts.answers += 1
        self.counts.cut_off += answer.cut_off
        self.counts.unboxed += last_boxed(answer.text) is None
        self.counts.tokens += answer.tokens or 0
        self.counts.counted += answer.tokens is not None


def check_model(arguments: OpenAIArguments, model: str, option: str, patience: float) -> None:
    """Whether the server is there and serves the model. Raises UserError."""
    check_server(arguments, model, read_key(arguments, option), option, patience)


def _fields(decoding: Decoding) -> dict[str, Any]:
    """The decoding as fields of a request; what changes nothing is left out, because not all
    servers know it."""
    fields: dict[str, Any] = {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
    }
    rare = {name: getattr(decoding, name) for name in ("top_k", "min_p", "presence_penalty")}
    fields |= {name: value for name, value in rare.items() if value}
    if decoding.repetition_penalty != 1.0:
        fields["repetition_penalty"] = decoding.repetition_penalty
    return fields
