"""The gateway: the one address that a harness knows, on the loopback interface, with a key of its
own.

What a harness asks is asked of the model with the suite's decoding instead of the harness's, with
the closing instruction in place of the benchmark's format directives, and once only, because
answers are kept. A second path leads to the judge, for benchmarks with a judge prompt of their own.
The first thing that goes wrong ends the row: `trouble` holds it, and every request after it is
refused.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from zppo.data.question import Question
from zppo.grading.boxes import last_boxed
from zppo.prompting.prompts import PromptSet
from zppo.suites.harness import without_directives
from zppo_actors.suites.asked import AskedModel

CHAT = "/v1/chat/completions"
JUDGE = "/judge"
"""Begins the paths that lead to the judge."""
MAX_HEAD, MAX_BODY = 1 << 16, 1 << 30
"""Bytes; a body holds pictures and the frames of videos."""

Ask: TypeAlias = Callable[[list[dict[str, Any]]], Awaitable[str]]


class BadRequest(ValueError):
    """What a harness sent is no request that can be passed on; the message is one sentence."""


class Rewriter:
    """From the harness's conversation to the one that the model sees, and from its answer to the
    one that the harness sees."""

    def __init__(self, prompts: PromptSet, directives: Sequence[str], final_only: bool) -> None:
        self._prompts = prompts
        self._directives = directives
        self._final_only = final_only

    def asked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The closing instruction ends the last words of the user. Raises BadRequest."""
        clean = [self._clean(message) for message in messages]
        kept = [message for message in clean if message["content"]]
        if not kept or kept[-1].get("role") != "user":
            raise BadRequest("the harness asked an empty question")
        content = kept[-1]["content"]
        if isinstance(content, str):
            return [*kept[:-1], {**kept[-1], "content": self._closed(content)}]
        last = max(
            (i for i, part in enumerate(content) if part.get("type") == "text"), default=None
        )
        words = content[last]["text"] if last is not None else ""
        closing = {"type": "text", "text": self._closed(words)}
        before, after = (content, []) if last is None else (content[:last], content[last + 1 :])
        return [*kept[:-1], {**kept[-1], "content": [*before, closing, *after]}]

    def answered(self, text: str) -> str:
        """The response; the content of its last box alone where the harness's parser wants no more.
        Without a box it is the whole response."""
        return (last_boxed(text) or text) if self._final_only else text

    def _clean(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": without_directives(content, self._directives)}
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise BadRequest("the harness sent a message without content")
        parts = [
            {**part, "text": without_directives(str(part.get("text")), self._directives)}
            if part.get("type") == "text"
            else part
            for part in content
        ]
        return {**message, "content": [p for p in parts if p.get("type") != "text" or p["text"]]}

    def _closed(self, words: str) -> str:
        prompt = self._prompts.plain(Question(id="", text=words, answer=""))
        return prompt.messages[-1].content


class Gateway:
    """Use as an asynchronous context; `answered` counts the model's answers as they come."""

    def __init__(
        self,
        model: AskedModel,
        judge: AskedModel | None,
        rewriter: Rewriter,
        answered: Callable[[], None],
    ) -> None:
        self.key = secrets.token_urlsafe(24)
        self.trouble: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._model = model
        self._judge = judge
        self._rewriter = rewriter
        self._answered = answered
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Gateway:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=MAX_HEAD)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (head := await _head(reader)) is not None:
                path, headers = head
                known = self._knows(headers.get("authorization", "").strip())
                # A stranger gets no byte of a body into memory.
                body = await _body(reader, headers) if known else b""
                writer.write(
                    _response(*(await self._answer(path, body) if known else (401, b"{}")))
                )
                await writer.drain()
                if not known:
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            pass  # the harness went away, or sent no HTTP
        except asyncio.CancelledError:
            pass  # by `__aexit__`, which waits for it
        finally:
            writer.close()
            self._connections.discard(task)

    def _knows(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode(), f"Bearer {self.key}".encode())

    async def _answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the response."""
        judging = path.startswith(JUDGE)
        if path.removeprefix(JUDGE) != CHAT:
            return 404, b"{}"
        if self.trouble.done() or (judging and self._judge is None):
            return 400, b'{"error": {"message": "nothing answers here"}}'
        try:
            text = await (self._ask_judge(body) if judging else self._ask_model(body))
        except Exception as error:  # a full disk, too; who asked can do nothing about it
            if not self.trouble.done():
                self.trouble.set_result(error)
            return 400, msgspec.json.encode({"error": {"message": str(error)}})
        return 200, msgspec.json.encode(_completion(text))

    async def _ask_model(self, body: bytes) -> str:
        answer = await self._model.ask(self._rewriter.asked(_messages(body)))
        self._answered()
        return self._rewriter.answered(answer.text)

    async def _ask_judge(self, body: bytes) -> str:
        assert self._judge is not None
        return (await self._judge.ask(_messages(body))).text.rpartition("</think>")[2].strip()


def _messages(body: bytes) -> list[dict[str, Any]]:
    try:
        asked = msgspec.json.decode(body, type=dict[str, Any])
        return msgspec.convert(asked.get("messages"), list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the harness sent no chat completions request") from None


def _completion(text: str) -> dict[str, Any]:
    """A response as OpenAI's API has it, as far as the harnesses read it."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "zppo",
        "object": "chat.completion",
        "created": 0,
        "model": "zppo",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


async def _head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    """Path and headers of the next request; None at the end. Raises ValueError."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    _, path, _ = first.split(" ")
    headers = {name.strip().lower(): value for name, _, value in (x.partition(":") for x in lines)}
    return path, headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    """Raises ValueError."""
    size = int(headers.get("content-length", "0"))
    if not 0 <= size <= MAX_BODY:
        raise ValueError("the body is too large")
    return await reader.readexactly(size)


def _response(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body
