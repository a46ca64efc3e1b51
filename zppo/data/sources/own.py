"""A source of the user's own: a function without arguments that gives rows, by import path or by
the name under which an installed package announces it.

Rows are dictionaries, as a JSONL file has them, numbered from 1. The function runs in every process
that reads the questions (launcher and controller, and again on every resume), and must give the
same rows in the same order each time: the digest of the corpus says when it did not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from zppo import extensions
from zppo.config.paths import absolute_use
from zppo.data.sources.base import RawRow, Source, by_first_row
from zppo.data.sources.jsonl import as_row, kind_of
from zppo.data.sources.layouts import Wanted
from zppo.errors import UserError, first_line

MAX_ROWS = 10_000_000
"""A function that never ends would fill the memory."""


def open_own(use: str, wanted: Wanted, base: Path) -> Source:
    """Import and call what `use` names; relative files start at `base`. Raises UserError."""
    use = absolute_use(use, use, base)
    function = extensions.load(use, use, "source").value
    extensions.check_call(use, use, function, ())
    columns, rows = by_first_row(_rows(use, function), wanted)
    file, _, name = use.rpartition(":")
    return Source(
        name=use,
        stem=name,
        folder=Path(file).parent if file.endswith(".py") else base,
        unit="row",
        rows=rows,
        columns=columns,
    )


def _rows(use: str, function: Any) -> Iterator[RawRow]:
    number = 0
    try:
        for number, row in enumerate(_given(use, function), start=1):
            if number > MAX_ROWS:
                break
            yield number, _checked(row)
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # whatever the user's code raises, even SystemExit
        raise UserError(
            f"{use}, row {number + 1}: raised {type(error).__name__}: {first_line(error)}"
        ) from None
    if number > MAX_ROWS:
        raise UserError(f"{use}: gave more than {MAX_ROWS} rows; expected a source that ends")


def _given(use: str, function: Any) -> Iterator[Any]:
    """What the function gives, a row at a time; what it prints is no output of a command."""
    with redirect_stdout(sys.stderr):
        rows = iter(_iterable(use, function()))
    while True:
        with redirect_stdout(sys.stderr):
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def _iterable(use: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        raise UserError(f"{use}: gave a {kind_of(value)}; expected rows, one dictionary each")
    return value


def _checked(row: Any) -> dict[str, Any] | str:
    if isinstance(row, dict) and not all(isinstance(name, str) for name in row):
        return "a row whose columns have names that are no text"
    return as_row(row)
