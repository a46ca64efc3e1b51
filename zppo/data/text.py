"""Text of a row, and the one exception that makes a row a bad one."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from zppo.data.sources.jsonl import kind_of
from zppo_protocol.places import without_places

MAX_TEXT = 1_000_000
"""Characters of one question or answer; far above any real one, and below what a message may
carry."""


_UNFIT = re.compile("[\0\ud800-\udfff]")


class RowError(ValueError):
    """Why one row is bad; becomes a `BadRow`."""


def as_text(value: object, name: str) -> str:
    """Text, or a finite number (in tables a decimal one too) as its text. `name` is what the row
    calls it. Raises RowError."""
    if isinstance(value, str):
        return words(value, name)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number of more digits than any float, or Python, takes
            raise RowError(f"{name} is a number of too many digits; expected it as text") from None
        if not finite:
            raise RowError(f"{name} is not a finite number")
        return f"{value:f}" if isinstance(value, Decimal) else str(value)
    raise RowError(f"{name} is a {kind_of(value)}; expected text or a number")


def bounded(text: str, name: str) -> str:
    """The text without outer white space. Raises RowError if nothing is left, or too much."""
    text = text.strip()
    if not text:
        raise RowError(f"{name} is empty")
    if len(text) > MAX_TEXT:
        raise RowError(f"{name} has {len(text)} characters; at most {MAX_TEXT} are taken")
    return text


def clean(value: str, name: str) -> str:
    """Refuse what JSON allows but no tokenizer or message can carry."""
    if _UNFIT.search(value):
        raise RowError(f"{name} holds a NUL or half a surrogate pair")
    return value


def words(value: str, name: str) -> str:
    """The same of words, which lose the character that stands for pictures here and for nothing
    there. Raises RowError."""
    return without_places(clean(value, name))
