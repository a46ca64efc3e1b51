"""JSONL: one JSON object per line, UTF-8. Numbers are line numbers; blank lines are passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from zppo.data.sources.base import RawRow, Source, by_first_row
from zppo.data.sources.layouts import Wanted
from zppo.data.sources.streams import BYTE_ORDER_MARK, lines_of, stem_of

_ENDS = re.compile(rb'"[ \t\r\n]*:')
_ESCAPED = re.compile(rb'\\"[ \t\r\n]*:')


def open_jsonl(file: Path, wanted: Wanted) -> Source:
    """Open a JSONL file. Its first object says which layout it has; whether other rows have the
    columns shows row by row."""
    columns, rows = by_first_row(jsonl_rows(file), wanted)
    return Source(
        name=str(file),
        stem=stem_of(file),
        folder=file.parent,
        unit="line",
        rows=rows,
        columns=columns,
    )


def jsonl_rows(file: Path) -> Iterator[RawRow]:
    """One raw row per non-blank line. Files that were joined keep the byte order marks that they
    began with, before some line in the middle. Lines that are not UTF-8 or not a JSON object carry
    their reason."""
    for line, data in lines_of(file):
        if data.strip() not in (b"", BYTE_ORDER_MARK):
            yield line, _decode(data.removeprefix(BYTE_ORDER_MARK))


def _decode(data: bytes) -> dict[str, Any] | str:
    try:
        data.decode("utf-8")
        row = msgspec.json.decode(data)
        twice = key_twice(data, row)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start + 1} of the line)"
    except (msgspec.DecodeError, RecursionError) as error:
        return f"not a JSON value ({error})"
    return as_row(row) if twice is None else f"the key {twice!r} stands in it twice; expected once"


def key_twice(data: bytes, value: object) -> str | None:
    """A key that an object of a JSON text holds twice, of which decoding kept the last; None if
    there is none.

    `value` is what was decoded. A text has a colon for each key, so where it has as many as the
    value has keys, or as many behind quotes, nothing need be read again.
    """
    if isinstance(value, dict) and data.count(b":") == len(value):
        return None
    if b'\\\\"' not in data and _count_ends(data) == _count_keys(value):
        return None
    found: list[str] = []

    def look(pairs: list[tuple[str, None]]) -> None:
        names = set()
        for name, _ in pairs:
            found.extend([name] if name in names else [])
            names.add(name)

    json.loads(data, object_pairs_hook=look)
    return found[0] if found else None


def _count_ends(data: bytes) -> int:
    r"""How many quotes have a colon behind them: all that end a key, and those that begin a text
    with one. Escaped quotes do not count, in a text without `\\"`."""
    escaped = len(_ESCAPED.findall(data)) if b'\\"' in data else 0
    return len(_ENDS.findall(data)) - escaped


def _count_keys(value: Any) -> int:
    """How many keys the objects in a decoded value have together."""
    count, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            count += len(one)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return count


def as_row(value: object) -> dict[str, Any] | str:
    """The value as a raw row, or why it is none."""
    return (
        value if isinstance(value, dict) else f"a {kind_of(value)} where a JSON object was expected"
    )


def kind_of(value: object) -> str:
    """What a value is called in messages."""
    names = {
        bool: "true/false value",
        dict: "JSON object",
        list: "list",
        str: "text",
        type(None): "null",
    }
    number = "number" if isinstance(value, int | float) else f"{type(value).__name__} value"
    return names.get(type(value), number)
