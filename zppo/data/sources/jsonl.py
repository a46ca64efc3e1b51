"""JSONL: one JSON object per line, UTF-8. Numbers are line numbers; blank lines are passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from zppo.data.sources.base import RawRow, Source, by_first_row
from zppo.data.sources.layouts import Wanted
from zppo.data.sources.streams import lines_of, stem_of


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
    """One raw row per non-blank line; lines that are not UTF-8 or not a JSON object carry their
    reason."""
    for line, data in lines_of(file):
        if data.strip():
            yield line, _decode(data)


def _decode(data: bytes) -> dict[str, Any] | str:
    try:
        data.decode("utf-8")
        row = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start + 1} of the line)"
    except (msgspec.DecodeError, RecursionError) as error:
        return f"not a JSON value ({error})"
    return as_row(row)


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
