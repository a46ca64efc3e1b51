"""A method of a user's own, checked as far as it can be before a run: its fields, its functions."""

from __future__ import annotations

from typing import Any, get_args

from zppo import extensions
from zppo.algorithm.methods.base import Loss, Method, TeacherDraws
from zppo.algorithm.reformulations import Preparation
from zppo.algorithm.window import COMPRESS, EVALUATE, PLAIN, SCORE, TEACHER, WRITE_HINT
from zppo.config.topology import JUDGE
from zppo.errors import UserError, nearest

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
        _expect(setting, use, field, getattr(value, field), isinstance(getattr(value, field), str))
    for field in ("replay", "teacher_tokens"):
        _expect(setting, use, field, getattr(value, field), isinstance(getattr(value, field), bool))
    for field, names in (("teacher_draws", get_args(TeacherDraws)), ("loss", get_args(Loss))):
        _choice(setting, f"{use!r}: {field}", getattr(value, field), names)
    updates = value.updates_per_step
    whole = updates is None or (isinstance(updates, int) and updates >= 1)
    _expect(setting, use, "updates_per_step", updates, whole)
    extensions.check_call(setting, f"{use}: composer", value.composer, ("visit", "rng"))
    _check_reformulations(setting, use, value.reformulations)
    return value


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
