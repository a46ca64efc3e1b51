"""A small HTTP server with the chat completions API that behaves as it is told, one answer after
the other.

It runs in a thread of its own, on a real socket of the loopback interface. An answer is a coroutine
function that writes raw bytes; when the given answers are used up, every request gets a good one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

MODEL = "big-teacher"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def asked(self) -> int:
        return int(self.body.get("n", 1))


Answer: TypeAlias = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """`requests` are the chat completions so far; `most_at_once` is how many choices were ever
    asked for together."""

    def __init__(
        self, *answers: Answer, models: tuple[str, ...] = (MODEL,), key: str | None = None
    ) -> None:
        self.answers = list(answers)
        self.default: Answer = good()
        self.models = models
        self.models_answer: Answer | None = None
        self.key = key
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.most_at_once = 0
        self.base_url = ""
        self.loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while (request := await read_request(reader)) is not None and not writer.is_closing():
                await self._serve(request, writer)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _serve(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            await status(401, said=f"Incorrect key: {request.headers.get('authorization')}")(
                request, writer
            )
        elif request.path == "/v1/models":
            await (self.models_answer or model_list(self.models))(request, writer)
        elif request.path == "/v1/chat/completions":
            self.requests.append(request)
            self.open += request.asked
            self.most_at_once = max(self.most_at_once, self.open)
            try:
                await (self.answers.pop(0) if self.answers else self.default)(request, writer)
            finally:
                self.open -= request.asked
        else:
            await status(404)(request, writer)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Run the server in a thread as long as the block lasts."""
    thread = threading.Thread(target=server.loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), server.loop).result()
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), server.loop).result()
    finally:
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join()
        server.loop.close()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(body) if body else {})


# ---- answers -------------------------------------------------------------------------------------


def raw(body: bytes, code: int = 200, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def reply_with(body: bytes, code: int = 200, **headers: str) -> Answer:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(raw(body, code, **headers))

    return answer


def status(code: int, said: str = "", **headers: str) -> Answer:
    return reply_with(said.encode(), code, **headers)


def model_list(models: tuple[str, ...]) -> Answer:
    return reply_with(
        json.dumps({"object": "list", "data": [{"id": name} for name in models]}).encode()
    )


def text_of(request: Request, index: int) -> str:
    """What a good answer says: it shows the seed, so that a test sees which completion it is."""
    return f"choice {request.body.get('seed', 0) + index}: \\boxed{{1}}"


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def piece(index: int, text: str | None, reason: str | None = None, **delta: Any) -> bytes:
    return event(
        {
            "choices": [
                {"index": index, "delta": {"content": text, **delta}, "finish_reason": reason}
            ]
        }
    )


def good(makes: int | None = None, usage: bool = True, reason: str = "stop") -> Answer:
    """A stream with `makes` choices, or as many as asked for."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        choices = request.asked if makes is None else makes
        body = b": a comment\r\n\r\n"
        for index in range(choices):
            text = text_of(request, index)
            body += (
                piece(index, "", role="assistant") + piece(index, text[:4]) + piece(index, text[4:])
            )
            body += piece(index, None, reason)
        if usage:
            body += event(
                {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5 * choices}}
            )
        body += b"data: [DONE]\n\n"
        writer.write(raw(body, Content_Type="text/event-stream; charset=utf-8"))

    return answer


def stream(*parts: bytes) -> Answer:
    """A stream of just these bytes, each written on its own."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        size = sum(map(len, parts))
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {size}\r\n\r\n".encode()
        )
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answer


def whole(**changes: Any) -> Answer:
    """One JSON document with all choices, for servers that do not stream; `changes` replace its
    fields."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text_of(request, i)},
                "finish_reason": "length",
            }
            for i in reversed(range(request.asked))
        ]
        data = {
            "choices": choices,
            "usage": {"prompt_tokens": 7, "completion_tokens": 9},
            **changes,
        }
        writer.write(raw(json.dumps(data).encode(), Content_Type="application/json"))

    return answer


def cut(after: bytes = b"") -> Answer:
    """Begin a stream, and close the connection in the middle of it."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 100000\r\n\r\n"
            + after
        )
        await writer.drain()
        writer.close()

    return answer


def drip(seconds: float = 0.02) -> Answer:
    """A stream that never ends, a few bytes at a time."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        while True:
            writer.write(b"3\r\n: \n\r\n")
            await writer.drain()
            await asyncio.sleep(seconds)

    return answer


def flood(part: bytes = b"x" * 0x10000) -> Answer:
    """A body without end, as fast as it is read: one line that never ends, or the same event for
    ever."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        while True:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()

    return answer


def silent() -> Answer:
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.get_running_loop().create_future()

    return answer


class Crowd:
    """Holds every request until `size` of them are there, and then a moment longer, for those that
    should not come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.present = 0
        self.there = asyncio.Event()

    async def __call__(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.present += request.asked
        if self.present >= self.size:
            self.there.set()
        await self.there.wait()
        await asyncio.sleep(0.05)
        await good()(request, writer)
