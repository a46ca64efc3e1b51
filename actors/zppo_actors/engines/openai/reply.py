"""What comes back: a stream of events or one JSON document, collected into choices.

Nothing of it is trusted. A reply is whole, every choice with its text and its reason to end, or it
is `RequestFailed`; a piece is held in memory only up to the bounds, whatever the server sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from zppo_actors.engines.openai.retry import RequestFailed

MAX_TEXT = 4_000_000
"""Characters of one completion; the protocol carries no more."""
CUT_SHORT = ("length", "content_filter")
BROKEN_OFF = ("abort", "error")
"""Reasons to end that are none: the server gave up."""
DONE = b"[DONE]"


class Delta(Struct):
    """A piece of a choice; the reasoning of a model that shows it apart is progress, but not part
    of the response."""

    content: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None


class Piece(Struct):
    index: int
    delta: Delta
    finish_reason: str | None = None


class Counts(Struct):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class Chunk(Struct):
    """One event of a stream. Both fields may be absent: some servers send events of their own in
    between."""

    choices: list[Piece] = []
    usage: Counts | None = None
    error: Any = None


class Text(Struct):
    content: str | None


class WholeChoice(Struct):
    index: int
    message: Text
    finish_reason: str | None


class Whole(Struct):
    choices: list[WholeChoice]
    usage: Counts | None = None


class Choice(Struct, frozen=True):
    text: str
    finish_reason: Literal["stop", "length"]


class Reply(Struct, frozen=True):
    """The choices in their order, at least one, and what the server counted for all of them."""

    choices: list[Choice]
    completion_tokens: int | None
    prompt_tokens: int | None


class Events:
    """Cuts the bytes of an event stream into the data of its events (WHATWG HTML, section
    9.2.6)."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The events that this piece completes."""
        self._rest += piece
        if b"\n" not in piece:
            return
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        for line in lines:
            yield from self._line(line.removesuffix(b"\r"))

    def close(self) -> Iterator[bytes]:
        """The last event, if the stream ended without the empty line after it."""
        yield from self._line(bytes(self._rest))
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if line.startswith(b"data:"):
            self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
        elif not line and self._data:
            yield b"\n".join(self._data)
            self._data = []


class Collector:
    """The choices of one streamed reply, `asked` of them at most."""

    def __init__(self, asked: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(asked)]
        self._sizes = [0] * asked
        self._reasons: list[str | None] = [None] * asked
        self._seen: set[int] = set()
        self._counts = Counts()
        self.done = False

    def add(self, data: bytes) -> bool:
        """Take the data of one event; whether anything was sampled in it. Raises RequestFailed."""
        if data.strip() == DONE:
            self.done = True
            return False
        chunk = parse(data, Chunk)
        if chunk.error is not None:
            raise RequestFailed(f"the server broke off: {str(chunk.error)[:500]}", retryable=True)
        if chunk.usage is not None:
            self._counts = chunk.usage
        taken = [self._take(piece) for piece in chunk.choices]
        return any(taken)

    def reply(self) -> Reply:
        """The whole reply. Raises RequestFailed if it is not whole."""
        choices = [self._choice(index) for index in sorted(self._seen) if index < len(self._texts)]
        surplus = len(self._seen) - len(choices)
        return make_reply(choices, Counts() if surplus else self._counts)

    def _take(self, piece: Piece) -> bool:
        self._seen.add(piece.index)
        if not 0 <= piece.index < len(self._texts):
            if piece.index < 0 or len(self._seen) > 2 * len(self._texts) + 100:
                raise RequestFailed(
                    f"the answer makes no sense: a choice with index {piece.index}", retryable=True
                )
            return False
        text = piece.delta.content or ""
        self._sizes[piece.index] += len(text)
        if self._sizes[piece.index] > MAX_TEXT:
            raise RequestFailed(
                f"the answer has a text of more than {MAX_TEXT} characters", retryable=True
            )
        self._texts[piece.index].append(text)
        self._reasons[piece.index] = piece.finish_reason or self._reasons[piece.index]
        return bool(text or piece.delta.reasoning_content or piece.delta.reasoning)

    def _choice(self, index: int) -> Choice:
        reason = self._reasons[index]
        if reason is None:
            raise RequestFailed("the answer ended in the middle", retryable=True)
        return make_choice("".join(self._texts[index]), reason)


def whole_reply(data: bytes, asked: int) -> Reply:
    """The reply of a server that does not stream. Raises RequestFailed."""
    whole = parse(data, Whole)
    ordered = sorted(whole.choices, key=lambda choice: choice.index)
    choices = [
        make_choice(choice.message.content or "", choice.finish_reason)
        for choice in ordered[:asked]
    ]
    return make_reply(choices, whole.usage or Counts() if len(ordered) <= asked else Counts())


def make_choice(text: str, reason: str | None) -> Choice:
    """Raises RequestFailed for a choice that is not one."""
    if reason is None or reason in BROKEN_OFF:
        raise RequestFailed(
            f"the answer was not finished (finish_reason {reason!r})", retryable=True
        )
    if len(text) > MAX_TEXT:
        raise RequestFailed(
            f"the answer has a text of more than {MAX_TEXT} characters", retryable=True
        )
    return Choice(text=text, finish_reason="length" if reason in CUT_SHORT else "stop")


def make_reply(choices: list[Choice], counts: Counts) -> Reply:
    """Raises RequestFailed for a reply without choices."""
    if not choices:
        raise RequestFailed("the answer has no choices", retryable=True)
    return Reply(
        choices=choices,
        completion_tokens=_count(counts.completion_tokens),
        prompt_tokens=_count(counts.prompt_tokens),
    )


def _count(value: int | None) -> int | None:
    """A count that can be one."""
    return value if value is not None and 0 <= value <= 2**53 else None


Parsed = TypeVar("Parsed", bound=Struct)


def parse(data: bytes, kind: type[Parsed]) -> Parsed:
    """Raises RequestFailed for what is not JSON, or not of this kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestFailed(f"the answer makes no sense: {error}", retryable=True) from error
