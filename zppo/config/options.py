"""Kinds of command-line options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import msgspec

from zppo.config.strict_yaml import parse
from zppo.config.topology import DataConfig, Field
from zppo.errors import UserError

Kind = TypeVar("Kind")


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


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, and not less than `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


positive = at_least(1)
"""The type of an option that counts."""
counting = at_least(0)
"""The type of an option that counts and may be 0."""


def several(kind: Callable[[str], Kind]) -> Callable[[str], list[Kind]]:
    """The type of an option that is one or more of a kind, with commas between them."""

    def listed(text: str) -> list[Kind]:
        return [kind(part) for part in text.split(",")]

    return listed


def finite(text: str) -> float:
    """The type of an option that is any number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def seconds(text: str) -> float:
    """The type of an option that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
