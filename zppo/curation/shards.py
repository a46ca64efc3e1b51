"""The files of a source, in both layouts, as numbered raw rows: JSONL with paths of pictures, and
Parquet or Arrow with pictures as `{bytes, path}`.

A file is read from any row on, with the columns of the recipe alone, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct

from zppo.curation.recipe import SourceConfig
from zppo.data.sources.base import RawRow
from zppo.data.sources.jsonl import jsonl_rows
from zppo.data.sources.layouts import paths_of, value_of
from zppo.data.sources.streams import PACKED
from zppo.data.sources.tables import SUFFIXES, table_columns, table_rows
from zppo.errors import UserError, nearest, sendable

LINES = (".jsonl", *(f".jsonl{packed}" for packed in PACKED))
KINDS = (*SUFFIXES, *LINES)
FIRST_ROWS = 100
"""Rows of JSONL that are looked at for a column; a row may leave out what is null."""


class Shard(Struct, frozen=True, kw_only=True):
    """One file. `columns` are those of the recipe that it may have, field -> columns."""

    source: str
    folder: Path
    """of the source; a picture's path may start here as well as beside the file"""
    file: Path
    columns: Mapping[str, list[str]]

    @property
    def name(self) -> str:
        """The path within the source."""
        return sendable(self.file.relative_to(self.folder).as_posix())

    @property
    def stamp(self) -> tuple[str, str, int, int]:
        """What tells that the file is still the same: source, path, size and time of change."""
        found = self.file.stat()
        return self.source, self.name, found.st_size, found.st_mtime_ns

    def place(self, number: int) -> str:
        """Where a row stands, for people."""
        lines = self.file.name.endswith(LINES)
        return sendable(f"{self.file}:{number}" if lines else f"{self.file}, row {number}")

    def rows(self, start: int = 0) -> Iterator[RawRow]:
        """Rows with a number above `start`: of a table from 1, of JSONL their lines. Raises
        UserError where the file is damaged."""
        if self.file.name.endswith(LINES):
            return ((number, row) for number, row in jsonl_rows(self.file) if number > start)
        wanted = [column for columns in self.columns.values() for column in columns]
        return enumerate(table_rows(self.file, wanted, start), start=start + 1)

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """What a row has in the first column of a field that is not null; None without any."""
        values = (value_of(row, column) for column in self.columns.get(field, ()))
        return next((value for value in values if value is not None), None)


def find_shards(source: str, config: SourceConfig, folder: Path) -> list[Shard]:
    """The files of a source in order of their names. Raises UserError for a folder without any, for
    a link to nothing, and for a file without a column that the recipe names."""
    if not folder.is_dir():
        raise UserError(
            f"--{source.replace('_', '-')} {folder}: is no folder; expected the data set"
        )
    files = [file for file in sorted(folder.rglob("*")) if _is_read(file, folder, config)]
    if not files:
        raise UserError(
            f"--{source.replace('_', '-')} {folder}: holds no file that sources.{source} of the "
            f"recipe reads; expected {', '.join(KINDS)} files by the patterns "
            f"{', '.join(config.files)}"
        )
    return [
        Shard(source=source, folder=folder, file=file, columns=_columns(source, config, file))
        for file in files
    ]


def _is_read(file: Path, folder: Path, config: SourceConfig) -> bool:
    inner = file.relative_to(folder)
    hidden = any(part.startswith(".") for part in inner.parts)
    name = inner.as_posix()
    wanted = any(fnmatchcase(name, pattern) for pattern in config.files) and not any(
        fnmatchcase(name, pattern) for pattern in config.leave_out
    )
    if not file.name.endswith(KINDS) or hidden or not wanted:
        return False
    if file.is_symlink() and not file.exists():  # its rows would be missing without a word
        raise UserError(
            f"{file}: is a link to a file that is not there; expected the whole data set"
        )
    return file.is_file()


def _columns(source: str, config: SourceConfig, file: Path) -> dict[str, list[str]]:
    """Field -> its columns: of a table those that it has, of JSONL all, since each row has its own.
    Raises UserError where none is there."""
    present, lines = _present(file), file.name.endswith(LINES)
    found: dict[str, list[str]] = {}
    for field, names in config.columns.named.items():
        there = [name for name in names if name in present]
        if not there:
            close = next(
                (hint for name in names if "did you" in (hint := nearest(name, present))), ""
            )
            raise UserError(
                f"{file}: there is no column {' or '.join(map(repr, names))} for "
                f"sources.{source}.columns.{field} of the recipe{close}; it has "
                f"{', '.join(present) or 'none'}"
            )
        found[field] = names if lines else there
    return found


def _present(file: Path) -> list[str]:
    """Columns of a file, nested ones by their paths."""
    if not file.name.endswith(LINES):
        return table_columns(file)
    rows = (row for _, row in islice(jsonl_rows(file), FIRST_ROWS) if isinstance(row, dict))
    return list(dict.fromkeys(path for row in rows for path in paths_of(row)))
