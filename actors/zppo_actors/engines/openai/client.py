"""One connection pool to one server, and one request at a time turned into a reply or a reason.

Invariants: the key is in the headers of requests and nowhere else, and whatever a server or a
library says is redacted before it goes on; a redirect is never followed, since it could carry the
key elsewhere; no more of an answer is read than its task can need.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import msgspec

from zppo.plan.engines.openai import OpenAIArguments
from zppo.plan.server import (
    CONNECT_SECONDS,
    MAX_SAID,
    REFUSED_STATUSES,
    RETRYABLE_STATUSES,
    api_url,
    describe,
    options,
    redact,
    unix_socket,
)
from zppo_actors.engines.openai.reply import Collector, Events, Reply, whole_reply
from zppo_actors.engines.openai.retry import RequestFailed, retry_after

DRAIN_SECONDS = 1.0
BASE_BYTES, BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Room for an answer: an event of one token takes about a quarter of this."""


class Client:
    """`complete` calls may overlap; `close` must be awaited."""

    def __init__(self, arguments: OpenAIArguments, key: str | None) -> None:
        self._url = api_url(arguments) + "/chat/completions"
        self._key = key
        path = unix_socket(arguments)
        limits = httpx2.Limits(max_connections=arguments.max_concurrent)
        self._http = httpx2.AsyncClient(
            **options(arguments, key),
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=limits,
            transport=None if path is None else httpx2.AsyncHTTPTransport(uds=path, limits=limits),
        )

    async def complete(
        self, body: dict[str, Any], asked: int, tokens: int, heard: Callable[[], None]
    ) -> Reply:
        """Ask for `asked` choices of at most `tokens` each; `heard()` is called for every piece
        that was sampled.

        Raises RequestFailed. The caller bounds the time.
        """
        content = msgspec.json.encode(body)
        try:
            async with self._http.stream(
                "POST", self._url, content=content, headers={"Content-Type": "application/json"}
            ) as response:
                await self._check_status(response)
                pieces = _bounded(response, BASE_BYTES + asked * tokens * BYTES_PER_TOKEN)
                if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    return await _streamed(pieces, asked, heard)
                return whole_reply(b"".join([piece async for piece in pieces]), asked)
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
            raise RequestFailed(describe(error, self._key), retryable=True) from None
        except RequestFailed as failure:
            reason = redact(str(failure), self._key)
            raise RequestFailed(
                reason, retryable=failure.retryable, retry_after=failure.retry_after
            ) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def _check_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in REFUSED_STATUSES:  # what it says may hold parts of the key
            raise RequestFailed(f"the server refuses the key (HTTP {status})", retryable=False)
        said = await _beginning(response)
        raise RequestFailed(
            f"the server answers HTTP {status}{': ' if said else ''}{said}",
            retryable=status in RETRYABLE_STATUSES or status >= 500,
            retry_after=retry_after(response.headers.get("Retry-After"), time.time()),
        )


async def _streamed(pieces: AsyncIterator[bytes], asked: int, heard: Callable[[], None]) -> Reply:
    events, collector = Events(), Collector(asked)
    async for piece in pieces:
        for data in events.feed(piece):
            if collector.add(data):
                heard()
        if collector.done:
            reply = collector.reply()
            await _drain(pieces)
            return reply
    for data in events.close():
        collector.add(data)
    return collector.reply()


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Read the few bytes that end a body, without which the connection could not be used again."""
    with contextlib.suppress(TimeoutError, httpx2.HTTPError, RequestFailed):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in pieces:
                pass


async def _bounded(response: httpx2.Response, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes, up to `limit` bytes. Raises RequestFailed."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestFailed(
            "the answer is compressed, though that was not accepted", retryable=False
        )
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > limit:
            raise RequestFailed(f"the answer is larger than {limit} bytes", retryable=True)
        yield piece


async def _beginning(response: httpx2.Response) -> str:
    """The first characters of an error's body, on one line."""
    body = b""
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > 4 * MAX_SAID:
            break
    return " ".join(body.decode("utf-8", errors="replace").split())[:MAX_SAID]
