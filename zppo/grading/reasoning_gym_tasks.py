"""The tasks of the package `reasoning-gym`: which of them can be used here, and how one is built
from its settings.

A specification is `TASK?name=value&…`; values are JSON where they can be read as JSON, else text.
The package is an optional extra and is imported only when a task is built. Two things are asked of
a task: its questions follow from the seed alone, in every process, and an entry that went through
JSON is scored as before. `tools/reasoning_gym_tasks.py` checks both for every task; those that fail
are `REFUSED`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from zppo.errors import UserError, nearest

_UNSTABLE = "its questions differ from process to process although the seed is the same"
_NOT_JSON = "its scorer needs more than an entry can carry as JSON"
REFUSED = {
    "composite": "it mixes other tasks; name one of those",
    "arc_agi": _NOT_JSON,
    "rearc": _NOT_JSON,
    "game_of_life_halting": "its scorer takes every answer for right",
    "isomorphic_strings": _UNSTABLE,
    "knight_swap": _UNSTABLE,
    "list_functions": _UNSTABLE,
    "polynomial_multiplication": _UNSTABLE,
    "ransom_note": _UNSTABLE,
    "word_ladder": _UNSTABLE,
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def parse_specification(text: str, where: str) -> tuple[str, dict[str, str]]:
    """`TASK?name=value&…` as the name of the task and its raw settings. Raises UserError."""
    task, _, query = text.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise UserError(
            f"{where}: {query!r} cannot be read; expected TASK?name=value&name=value"
        ) from None
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: {twice} is given twice; expected each setting once")
    return task, dict(pairs)


def build_task(task: str, settings: Mapping[str, str], seed: int, size: int, where: str) -> Any:
    """The data set of a task, for `size` questions of stream `seed` (below 2^31). Raises
    UserError."""
    registry = _registry(where)
    if task in REFUSED:
        raise UserError(f"{where}: the task {task!r} cannot be used, because {REFUSED[task]}")
    if task not in registry:
        raise UserError(f"{where}: reasoning-gym has no task {task!r}{_hint(task, registry)}")
    dataset, config = registry[task]
    values = _values(config, settings, task, where)
    with quiet():
        try:
            return dataset(config=config(**values, seed=seed, size=size))
        except (AssertionError, ValueError, TypeError) as error:
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"{where}: the task {task!r} refuses its settings ({reason})") from None


def task_names(where: str) -> list[str]:
    """Names of all tasks that can be used. Raises UserError if the package is missing."""
    return sorted(set(_registry(where)) - set(REFUSED))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Some tasks print while they make or score a question."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _registry(where: str) -> dict[str, tuple[Any, Any]]:
    try:
        with quiet():
            import reasoning_gym  # noqa: F401  (fills the registry)
            from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            f"{where}: the package reasoning-gym is not installed; in the project's folder: "
            "pip install -e '.[reasoning-gym]'"
        ) from None
    registry: dict[str, tuple[Any, Any]] = DATASETS
    return registry


def _hint(task: str, registry: Mapping[str, object]) -> str:
    close = nearest(task, set(registry) - set(REFUSED))
    return close if "did you mean" in close else "; the names are in the package's gallery"


def _values(config: Any, settings: Mapping[str, str], task: str, where: str) -> dict[str, Any]:
    """Settings as values of the right kinds. Raises UserError with the nearest name."""
    defaults = {
        field.name: field.default for field in fields(config) if field.name not in ("seed", "size")
    }
    values = {}
    for name, text in settings.items():
        if name not in defaults:
            raise UserError(
                f"{where}: the task {task!r} has no setting "
                f"{name!r}{nearest(name, [*defaults, 'seed', 'size'])}"
            )
        values[name] = _value(text)
        kind = type(defaults[name])
        if kind in _KINDS and not _is_a(values[name], kind):
            raise UserError(f"{where}: {name} is {text!r}; expected {_KINDS[kind]}")
    return values


def _value(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return type(value) is kind
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
