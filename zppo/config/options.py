"""Kinds of command-line options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import msgspec

from zppo.config.base import MOST_SECONDS, MOST_THREADS
from zppo.config.strict_yaml import parse
from zppo.config.topology import DataConfig, Field
from zppo.errors import UserError

Kind = TypeVar("Kind")
LARGEST = 2**63 - 1
"""What a whole number of the protocol and of the tables holds."""
SHOWN = 40
"""Characters of what was given that its sentence repeats."""


def pair(text: str, option: str) -> tuple[str, Any]:
    """NAME=VALUE of an option, the value read as YAML. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{option} {text}: expected NAME=VALUE")
    return name, parse(value, f"{option} {text}").data


def data_settings(given: Mapping[str, Any]) -> DataConfig:
    """The section `data` that options give; only --field can be of a wrong kind. Raises
    UserError."""
    try:
        return msgspec.convert(given, DataConfig)
    except msgspec.ValidationError as error:
        names = ", ".join(get_args(Field))
        raise UserError(f"--field: {error}; expected one of {names} = COLUMN") from None


def between(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""

    def number(text: str) -> int:
        # Python reads no number of thousands of digits.
        value = int(text) if text.isdecimal() and len(text) <= len(str(LARGEST)) else None
        if value is None or not least <= value <= most:
            too_large = text.isdecimal() and (value is None or value > most)
            bounded = too_large or most < LARGEST
            wanted = f"from {least} to {most}" if bounded else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number {wanted}")
        return value

    return number


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, and not less than `least`."""
    return between(least, LARGEST)


positive = at_least(1)
"""The type of an option that counts."""
counting = at_least(0)
"""The type of an option that counts and may be 0, and of a seed."""
threads = between(1, MOST_THREADS)
"""The type of an option that is a number of threads."""


def several(kind: Callable[[str], Kind]) -> Callable[[str], list[Kind]]:
    """The type of an option that is one or more of a kind, with commas between them."""

    def listed(text: str) -> list[Kind]:
        return [kind(part) for part in text.split(",")]

    return listed


def finite(text: str) -> float:
    """The type of an option that is any number."""
    return _number(text, math.isfinite, "a number")


def share(text: str) -> float:
    """The type of an option that is a part of a whole."""
    return _number(text, lambda value: 0.0 < value <= 1.0, "a number above 0, at most 1")


def rate(text: str) -> float:
    """The type of an option that is so many a second."""
    return _number(text, lambda value: 0.0 < value < math.inf, "a number above 0")


def seconds(text: str) -> float:
    """The type of an option that is a time."""
    return _number(
        text, lambda value: 0.0 < value <= MOST_SECONDS, "a number of seconds above 0, at most 1e9"
    )


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not {expected}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
