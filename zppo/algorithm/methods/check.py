"""A method of a user's own, checked as far as it can be before a run: its fields, its functions."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, get_args

from msgspec import Struct, structs

from zppo import extensions
from zppo.algorithm.composition import Composition
from zppo.algorithm.methods.base import Loss, Method, TeacherDraws
from zppo.algorithm.reformulations import Preparation
from zppo.algorithm.window import (
    COMPRESS,
    EVALUATE,
    PLAIN,
    SCORE,
    TEACHER,
    WRITE_HINT,
    Candidate,
)
from zppo.config.topology import JUDGE
from zppo.errors import UserError, nearest, words_of
from zppo_protocol.values import Prompt

TAKEN = (PLAIN, TEACHER, EVALUATE, COMPRESS, WRITE_HINT, SCORE, JUDGE, "grade", "new", "replay")
"""Names of groups, tasks and metrics that a reformulation cannot have as its kind."""
MAX_KIND = 32
CALLS = {
    "admits": ("visit",),
    "draw": ("visit", "rng"),
    "prompt": ("visit", "candidates", "prompts"),
}
"""Methods of a reformulation and what they take."""


def check_method(setting: str, use: str, value: Any) -> Method:
    """`value` as the method that it must be. Raises UserError."""
    if not isinstance(value, Method):
        raise UserError(
            f"{setting}: {use!r} is of type {type(value).__name__}; expected a Method "
            "(zppo.algorithm.methods)"
        )
    for field in ("name", "title", "summary"):
        words = getattr(value, field)
        _expect(setting, use, field, words, isinstance(words, str) and bool(words.strip()))
    for field in ("replay", "teacher_tokens"):
        _expect(setting, use, field, getattr(value, field), isinstance(getattr(value, field), bool))
    for field, names in (("teacher_draws", get_args(TeacherDraws)), ("loss", get_args(Loss))):
        _choice(setting, f"{use!r}: {field}", getattr(value, field), names)
    updates = value.updates_per_step
    whole = updates is None or (type(updates) is int and updates >= 1)
    _expect(setting, use, "updates_per_step", updates, whole)
    extensions.check_call(setting, f"{use}: composer", value.composer, ("visit", "rng"))
    _check_reformulations(setting, use, value.reformulations)
    return structs.replace(
        value,
        composer=_guarded(
            f"{setting}: {use!r}: composer", value.composer, Composition, several=True
        ),
        reformulations=tuple(_Guarded.of(setting, use, one) for one in value.reformulations),
    )


class _Guarded(Struct, frozen=True, kw_only=True):
    """A reformulation of a user's, whose mistakes in a run are sentences too."""

    kind: str
    preparation: Preparation
    admits: Any
    draw: Any
    prompt: Any

    @classmethod
    def of(cls, setting: str, use: str, one: Any) -> _Guarded:
        where = f"{setting}: {use!r}: {type(one).__name__}"
        return cls(
            kind=one.kind,
            preparation=one.preparation,
            admits=_guarded(f"{where}.admits", lambda visit: bool(one.admits(visit)), bool),
            draw=_guarded(f"{where}.draw", one.draw, Candidate, several=True),
            prompt=_guarded(f"{where}.prompt", one.prompt, Prompt),
        )


def _guarded(where: str, function: Any, kind: type, *, several: bool = False) -> Callable[..., Any]:
    """The function; what it raises, or returns in place of a `kind` or of `several` in a list, is a
    UserError that begins with `where`."""

    def call(*arguments: Any) -> Any:
        try:
            result = function(*arguments)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{where} raised {type(error).__name__}: {words_of(error)} (line {last.lineno} of "
                f"{last.filename})"
            ) from error
        if isinstance(result, list) != several or not all(
            isinstance(one, kind) for one in (result if several else [result])
        ):
            what = f"a list of {kind.__name__}" if several else f"a {kind.__name__}"
            raise UserError(f"{where} returned {repr(result)[:60]}; expected {what}")
        return result

    return call


def _check_reformulations(setting: str, use: str, reformulations: Any) -> None:
    _expect(setting, use, "reformulations", reformulations, isinstance(reformulations, tuple))
    kinds: list[str] = []
    for one in reformulations:
        where = f"{use}: {type(one).__name__}"
        kind = getattr(one, "kind", None)
        named = isinstance(kind, str) and kind.isidentifier() and len(kind) <= MAX_KIND
        if not named or kind in TAKEN or kind in kinds:
            raise UserError(
                f"{setting}: {where}.kind is {kind!r}; expected a name of its own, of at most "
                f"{MAX_KIND} letters"
            )
        kinds.append(str(kind))
        _choice(
            setting,
            f"{where!r}: preparation",
            getattr(one, "preparation", None),
            get_args(Preparation),
        )
        for name, expected in CALLS.items():
            extensions.check_call(setting, f"{where}.{name}", getattr(one, name, None), expected)


def _choice(setting: str, what: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UserError(f"{setting}: {what} is {value!r}{nearest(str(value), names)}")


def _expect(setting: str, use: str, field: str, value: object, fits: bool) -> None:
    if not fits:
        kinds = {
            "reformulations": "a tuple of reformulations",
            "updates_per_step": "a whole number of at least 1, or None",
            **dict.fromkeys(("replay", "teacher_tokens"), "True or False"),
        }
        raise UserError(
            f"{setting}: {use!r}: {field} is {value!r}; expected {kinds.get(field, 'text')}"
        )
