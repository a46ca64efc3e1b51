"""Before any work: is a teacher's server there, does it take the key, does it serve the model? One
sentence each if not. And what every request to it has in common.

Invariants: the key is in the headers of requests and nowhere else, and what a library says is
redacted before it goes on; a redirect is never followed, since it could carry the key elsewhere.
"""

from __future__ import annotations

import difflib
import logging
import time
from typing import Any

import httpx2
import msgspec
from msgspec import Struct

from zppo.config.topology import OPENAI, Topology
from zppo.errors import UserError
from zppo.plan.engines.openai import OpenAIArguments, read_key, read_openai_arguments
from zppo.plan.processes import asked_teachers

PAUSE_SECONDS = 1.0
CONNECT_SECONDS = 10.0
UNIX = "unix:"
"""Begins the address of a server that a suite has started: the path of its socket follows. No
setting may name one."""
MAX_SAID = 500
"""Characters of a server's error that are repeated."""
MAX_BYTES = 8 << 20
RETRYABLE_STATUSES = (408, 409, 425, 429)
"""Besides all of 500 and more."""
REFUSED_STATUSES = (401, 403)

log = logging.getLogger("zppo.engine")


def headers(key: str | None) -> dict[str, str]:
    """Headers of every request. Nothing compressed is accepted, because its size would be unknown
    until it is read."""
    own = {"Accept-Encoding": "identity", "User-Agent": "zppo"}
    return {**own, "Authorization": f"Bearer {key}"} if key else own


def options(arguments: OpenAIArguments, key: str | None) -> dict[str, Any]:
    """What the clients for the probe and for the work have in common."""
    # These log every request; the actor's own log says what matters.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return {
        "headers": headers(key),
        "follow_redirects": False,
        # Proxies and certificates of the environment are for https; what is sent in the clear goes
        # straight there.
        "trust_env": arguments.base_url.startswith("https:"),
    }


def redact(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def describe(error: Exception, key: str | None) -> str:
    """An error of the transport, in words."""
    text = redact(str(error), key).strip()
    return f"{type(error).__name__}: {text}"[:MAX_SAID] if text else type(error).__name__


def unix_socket(arguments: OpenAIArguments) -> str | None:
    """The path of the server's Unix socket, if it has one."""
    url = arguments.base_url
    return url.removeprefix(UNIX) if url.startswith(UNIX) else None


def api_url(arguments: OpenAIArguments) -> str:
    """What the paths of the API follow in a request."""
    behind_socket = unix_socket(arguments) is not None
    return "http://localhost/v1" if behind_socket else arguments.base_url.rstrip("/")


class Served(Struct):
    id: str


class ModelList(Struct):
    data: list[Served]


def check_teachers_servers(topology: Topology, patience: float) -> None:
    """`check_server` for every teacher of the run that is behind one and may be asked. Raises
    UserError."""
    for one in asked_teachers(topology):
        if one.actor.engine == OPENAI:
            arguments = read_openai_arguments(one.actor.engine_args, one.actor_path)
            key = read_key(arguments, f"{one.actor_path}.engine_args")
            if arguments.check_model:
                model = arguments.model or one.model.model
                wait = min(arguments.startup_seconds, patience)
                check_server(arguments, model, key, one.actor_path, wait)


def check_server(
    arguments: OpenAIArguments, model: str, key: str | None, where: str, patience: float
) -> None:
    """Ask for the list of models until the server is up, `patience` seconds at most. Raises
    UserError."""
    deadline = time.monotonic() + patience
    where = f"{where}.engine_args"
    path = unix_socket(arguments)
    transport = None if path is None else httpx2.HTTPTransport(uds=path)
    told = options(arguments, key)
    with httpx2.Client(**told, transport=transport, timeout=CONNECT_SECONDS) as http:
        while True:
            trouble = _ask(http, arguments, model, key, where)
            if trouble is None:
                return
            if time.monotonic() + PAUSE_SECONDS > deadline:
                raise UserError(
                    f"{where}.base_url is {arguments.base_url!r}, where no server was ready within "
                    f"{patience:g} s ({trouble})"
                )
            log.info("waiting for the server at %s (%s)", arguments.base_url, trouble)
            time.sleep(PAUSE_SECONDS)


def _ask(
    http: httpx2.Client, arguments: OpenAIArguments, model: str, key: str | None, where: str
) -> str | None:
    """None if all is well, or what may yet pass. Raises UserError for what will not."""
    try:
        with http.stream("GET", api_url(arguments) + "/models") as response:
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
