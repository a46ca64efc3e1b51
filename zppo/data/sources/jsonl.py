"""JSONL: one JSON object per line, UTF-8. Numbers are line numbers; blank lines are passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from zppo.data.sources.base import Columns, RawRow, Source
from zppo.errors import UserError


def open_jsonl(file: Path, columns: Columns) -> Source:
    """Open a JSONL file; which columns it has shows row by row."""
    return Source(
        name=str(file),
        stem=file.stem,
        folder=file.parent,
        unit="line",
        rows=_rows(file),
        columns=columns.names,
    )


def _rows(file: Path) -> Iterator[RawRow]:
    """One raw row per non-blank line; lines that are not UTF-8 or not a JSON object carry their
    reason."""
    try:
        with file.open("rb") as stream:
            for line, data in enumerate(stream, start=1):
                if line == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if data.strip():
                    yield line, _decode(data)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); expected a question file"
        ) from None


def _decode(data: bytes) -> dict[str, Any] | str:
    try:
        data.decode("utf-8")
        row = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start + 1} of the line)"
    except (msgspec.DecodeError, RecursionError) as error:
        return f"not a JSON value ({error})"
    return row if isinstance(row, dict) else f"a {kind_of(row)} where a JSON object was expected"


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
