"""Before any work: is the server there, does it take the key, does it serve the model? One sentence
each if not."""

from __future__ import annotations

import difflib
import logging
import time

import httpx2
import msgspec
from msgspec import Struct

from zppo.errors import UserError
from zppo.plan.engines.openai import OpenAIArguments
from zppo_actors.engines.openai.client import (
    CONNECT_SECONDS,
    REFUSED_STATUSES,
    RETRYABLE_STATUSES,
    describe,
    options,
)

PAUSE_SECONDS = 1.0
MAX_BYTES = 8 << 20

log = logging.getLogger("zppo.engine")


class Served(Struct):
    id: str


class ModelList(Struct):
    data: list[Served]


def check_server(arguments: OpenAIArguments, model: str, key: str | None, where: str) -> None:
    """Ask for the list of models until the server is up, `startup_seconds` at most. Raises
    UserError."""
    deadline = time.monotonic() + arguments.startup_seconds
    where = f"{where}.engine_args"
    with httpx2.Client(**options(arguments, key), timeout=CONNECT_SECONDS) as http:
        while True:
            trouble = _ask(http, arguments, model, key, where)
            if trouble is None:
                return
            if time.monotonic() + PAUSE_SECONDS > deadline:
                raise UserError(
                    f"{where}.base_url is {arguments.base_url!r}, where no server was ready within "
                    f"{arguments.startup_seconds:g} s ({trouble})"
                )
            log.info("waiting for the server at %s (%s)", arguments.base_url, trouble)
            time.sleep(PAUSE_SECONDS)


def _ask(
    http: httpx2.Client, arguments: OpenAIArguments, model: str, key: str | None, where: str
) -> str | None:
    """None if all is well, or what may yet pass. Raises UserError for what will not."""
    try:
        with http.stream("GET", arguments.base_url.rstrip("/") + "/models") as response:
            status = response.status_code
            body = _read(response) if status == 200 else b""
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
        return describe(error, key)
    if status in RETRYABLE_STATUSES or status >= 500:
        return f"HTTP {status}"
    if status in REFUSED_STATUSES:
        raise UserError(
            f"{where}.api_key_env: the server at {arguments.base_url} {_refusal(key)} (HTTP "
            f"{status})"
        )
    names = _names(body)
    if names is None:
        raise UserError(
            f"{where}.base_url is {arguments.base_url!r}, which has no list of models (HTTP "
            f"{status}); expected the "
            "address up to the API's version, often /v1, or check_model: false for a server "
            "without a list"
        )
    if model not in names:
        raise UserError(
            f"{where}.model: the server at {arguments.base_url} serves no "
            f"{model!r}{_hint(model, names)}"
        )
    return None


def _read(response: httpx2.Response) -> bytes:
    """The body, up to `MAX_BYTES`: what is longer is cut and then is no list."""
    body = b""
    for piece in response.iter_raw():
        body += piece
        if len(body) > MAX_BYTES:
            break
    return body


def _refusal(key: str | None) -> str:
    return (
        "refuses the key"
        if key
        else "asks for a key; expected the name of the environment variable that holds it"
    )


def _names(body: bytes) -> list[str] | None:
    try:
        return [served.id for served in msgspec.json.decode(body, type=ModelList).data]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _hint(model: str, names: list[str]) -> str:
    """The nearest name, or some of those there are: hosted lists are long."""
    close = difflib.get_close_matches(model, names, n=1, cutoff=0.5)
    more = ", …" if len(names) > 10 else ""
    return (
        f" (did you mean {close[0]!r}?)"
        if close
        else f" (it serves: {', '.join(sorted(names)[:10])}{more})"
    )
