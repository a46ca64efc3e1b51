"""The engine 'openai': a teacher behind any server with OpenAI's chat completions API. Its
arguments and their check.

Invariants: a key is named, never given, so it is in no topology and no run directory; it leaves
this machine only over https unless the user allowed otherwise. Nothing here opens a connection.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from msgspec import UNSET, Meta, Struct, UnsetType

from zppo.config.served import ServedModel
from zppo.config.topology import OPENAI, RunConfig, SchedulerConfig
from zppo.errors import UserError, nearest
from zppo.plan.engines.own import convert_arguments

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
OWNED = {
    "model": "it is the engine argument model",
    "messages": "they are the prompt of the task",
    "n": "it is the size of the group; see choices_per_request",
    "stream": "answers are always streamed",
    "max_tokens": "it is the setting sampling.max_new_tokens; see length_field",
    "max_completion_tokens": "it is the setting sampling.max_new_tokens; see length_field",
    "top_k": "it is the setting sampling.top_k",
    "presence_penalty": "it is the setting sampling.presence_penalty",
    "chat_template_kwargs": "it is the teacher's setting chat_template_kwargs",
}
"""Fields of a request that `extra_body` cannot set, and where they come from."""
REMOVABLE = ("temperature", "top_p", "seed", "stream_options")
"""Fields that it cannot set either, but leave out with null, for servers that do not take them."""

Seconds = Annotated[float, Meta(gt=0.0, le=86_400.0)]


class OpenAIArguments(Struct, frozen=True, kw_only=True):
    """`engine_args` of this engine; docs/openai.md says what each is for."""

    base_url: str
    model: Annotated[str, Meta(min_length=1)] | None = None
    """Name of the served model; null is `teacher.model`."""
    api_key_env: str | UnsetType | None = UNSET
    """Environment variable that holds the key; one that is named must be set. Null sends no key."""
    max_concurrent: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Completions that are asked for at once."""
    timeout_seconds: Seconds = 200.0
    """One request, to the last byte of its answer."""
    retry_seconds: Seconds = 60.0
    """A request is tried again for so long after its first try began."""
    retry_budget: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    """Retries in hand for all requests together; ten requests that work give one back."""
    startup_seconds: Seconds = 60.0
    """How long the server may take to come up before the run ends."""
    choices_per_request: Annotated[int, Meta(ge=1)] | None = None
    """Null asks for a whole group in one request."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = {}
    check_model: bool = True
    """Ask the server for its list of models at the start."""
    allow_insecure: bool = False
    """Allow http to other machines."""


def read_openai_arguments(
    given: Mapping[str, Any], where: str, *, here: bool = True
) -> OpenAIArguments:
    """Convert and check `engine_args` of the section `where`, and the key unless the run is not to
    be `here`. Raises UserError."""
    arguments = convert_arguments(given, OpenAIArguments, where)
    where = f"{where}.engine_args"
    _check_url(arguments, where)
    _check_body(arguments.extra_body, where)
    if here:
        read_key(arguments, where)
    return arguments


def read_key(
    arguments: OpenAIArguments, where: str, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The key, or None where none is to be sent. Raises UserError, which never shows the key."""
    named = arguments.api_key_env
    if named is None:
        return None
    key = environment.get(
        DEFAULT_KEY_VARIABLE if isinstance(named, UnsetType) else named, ""
    ).strip()
    if not key:
        if isinstance(named, UnsetType):
            return None
        # The name is not repeated, because it may be a key that was put into the wrong place.
        raise UserError(f"{where}.api_key_env names an environment variable that is not set")
    if not all("!" <= character <= "~" for character in key):
        raise UserError(
            f"{where}.api_key_env: the variable's value is no key; it has spaces or unusual "
            "characters"
        )
    return key


def check_openai(
    served: ServedModel, scheduler: SchedulerConfig, run: RunConfig, *, here: bool = True
) -> None:
    """Check the arguments of a teacher with this engine, and the patience of the run with it; the
    key only of a run that is to be `here`. Raises UserError."""
    if served.actor.engine != OPENAI:
        return
    where = served.actor_path
    arguments = read_openai_arguments(served.actor.engine_args, where, here=here)
    silent = arguments.timeout_seconds + arguments.retry_seconds
    if silent >= scheduler.lease_seconds:
        raise UserError(
            f"{where}.engine_args: timeout_seconds and retry_seconds are {silent:g} together; "
            "expected less than "
            f"{scheduler.lease_seconds:g}, the scheduler.lease_seconds, after which the "
            "actor counts as stuck"
        )
    waiting = arguments.timeout_seconds + arguments.retry_seconds * scheduler.max_attempts
    if waiting >= run.no_progress_seconds:
        raise UserError(
            f"{where}.engine_args: timeout_seconds and scheduler.max_attempts times retry_seconds "
            f"are {waiting:g} "
            f"together; expected less than {run.no_progress_seconds:g}, the "
            "run.no_progress_seconds"
        )


def refuse_rollout(served: ServedModel) -> None:
    """Raises UserError if a rollout actor has this engine."""
    if served.role == "rollout" and served.actor.engine == OPENAI:
        raise UserError(
            f"{served.actor_path}.engine is {OPENAI!r}, which serves teachers only: training needs "
            "the token ids and the log-probs of the distribution that was sampled, and an engine "
            "that takes new weights"
        )


# ---- single arguments ----------------------------------------------------------------------------


def _check_url(arguments: OpenAIArguments, where: str) -> None:
    parts = _split(arguments.base_url)
    if parts is None:
        raise UserError(
            f"{where}.base_url is {arguments.base_url!r}; expected an http or https address such "
            "as http://127.0.0.1:8000/v1"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{where}.base_url: expected an address without a user name, a password, '?' or '#'; "
            "a key comes from the environment, see api_key_env"
        )
    if (
        parts.scheme == "http"
        and not _is_loopback(parts.hostname or "")
        and not arguments.allow_insecure
    ):
        allowed = "--allow-insecure" if where.startswith("--") else "allow_insecure: true"
        raise UserError(
            f"{where}.base_url is {arguments.base_url!r}, which sends prompts and the key in the "
            f"clear; expected https, or {allowed}"
        )


def _split(url: str) -> SplitResult | None:
    """The parts of a usable web address, or None."""
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        return None
    return parts if usable and url.isascii() and url.isprintable() and " " not in url else None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_body(extra: Mapping[str, Any], where: str) -> None:
    for name, value in extra.items():
        if name in OWNED:
            raise UserError(f"{where}.extra_body.{name} cannot be set: {OWNED[name]}")
        if name in REMOVABLE and value is not None:
            raise UserError(
                f"{where}.extra_body.{name} is {value!r}; expected null, which leaves it out of "
                "requests"
            )
        if value is None and name not in REMOVABLE:
            raise UserError(
                f"{where}.extra_body.{name} is null; only fields that are sent anyway can be left "
                f"out{nearest(name, REMOVABLE)}"
            )
