"""JSON: one file with a list of objects, or with an object that holds the list under `data`. Rows
are numbered from 1. A file of this name that has one object a line is read as JSONL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from zppo.data.sources.base import Source, by_first_row
from zppo.data.sources.jsonl import as_row, key_twice, kind_of, open_jsonl
from zppo.data.sources.layouts import Wanted
from zppo.data.sources.streams import stem_of, whole_of
from zppo.errors import UserError

LIST = "data"
"""The key of an object that holds the rows."""
_BYTE = re.compile(r"\(byte (\d+)\)")


def open_json(file: Path, wanted: Wanted) -> Source:
    """Open a JSON file. Raises UserError unless it holds a list."""
    data = whole_of(file)
    if _has_one_a_line(data):
        return open_jsonl(file, wanted)
    values = enumerate(_list(file, data), start=1)
    columns, rows = by_first_row(((i, as_row(value)) for i, value in values), wanted)
    return Source(
        name=str(file),
        stem=stem_of(file),
        folder=file.parent,
        unit="row",
        rows=rows,
        columns=columns,
    )


def _has_one_a_line(data: bytes) -> bool:
    """Whether the first line is an object by itself, and not the whole file in a line."""
    first, _, rest = data.strip().partition(b"\n")
    if not first.startswith(b"{"):
        return False
    try:
        value = msgspec.json.decode(first)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return bool(rest.strip()) or not isinstance(value.get(LIST), list)


def _list(file: Path, data: bytes) -> list[Any]:
    try:
        data.decode("utf-8")
        value = msgspec.json.decode(data)
        twice = key_twice(data, value)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8 text; expected JSON") from None
    except (msgspec.DecodeError, RecursionError) as error:
        found = _BYTE.search(str(error))
        line = data[: int(found[1]) if found else len(data)].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not JSON ({error}); expected a list of objects") from None
    if twice is not None:
        raise UserError(f"{file}: an object in it holds the key {twice!r} twice; expected once")
    rows = value.get(LIST) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        what = f"a {kind_of(value)}" + (f" without a list {LIST!r}" if value is not rows else "")
        raise UserError(f'{file}: holds {what}; expected a list of objects, or {{"{LIST}": […]}}')
    return rows
