"""CSV with a header: comma-separated, quoted as RFC 4180 says, UTF-8. Numbers are those of the line
on which a row begins; an empty field counts as missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from zppo.data.sources.base import RawRow, Source
from zppo.data.sources.layouts import Wanted, check_columns, settle
from zppo.data.sources.streams import MAX_LINE, lines_of, stem_of
from zppo.errors import UserError, count_of, first_line


def open_csv(file: Path, wanted: Wanted) -> Source:
    """Open a CSV file. Raises UserError if it has no header, or the header lacks a column."""
    records = _records(file)
    _, header = next(records, (1, []))
    _check_header(file, header)
    columns = settle(wanted, header)
    check_columns(file, columns, header)
    return Source(
        name=str(file),
        stem=stem_of(file),
        folder=file.parent,
        unit="line",
        rows=_rows(records, header),
        columns=columns,
    )


def _check_header(file: Path, header: Sequence[str]) -> None:
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if not any(header):
        raise UserError(f"{file}: holds no question; expected a header and at least one row")
    if twice is not None:
        raise UserError(f"{file}:1: the header has {twice!r} twice; expected each name once")


def _rows(records: Iterator[tuple[int, list[str]]], header: Sequence[str]) -> Iterator[RawRow]:
    for line, values in records:
        if len(values) != len(header):
            yield line, f"has {count_of(len(values), 'field')} where the header has {len(header)}"
        else:
            yield line, {name: value or None for name, value in zip(header, values, strict=True)}


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of each record that is not blank."""
    csv.field_size_limit(MAX_LINE)  # of the module, for want of one of a reader; ours is larger
    reader = csv.reader(_texts(file), strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file}:{begins}: not CSV ({first_line(error)}); expected fields with commas "
                "between them, and quotes around those that hold one"
            ) from None
        if values:
            yield begins, values


def _texts(file: Path) -> Iterator[str]:
    for line, data in lines_of(file):
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{line}: not UTF-8 text (byte {error.start + 1} of the line); expected CSV "
                "in UTF-8"
            ) from None
