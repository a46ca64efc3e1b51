"""Parquet and Arrow files, and the folders in which the `datasets` library and the Hub keep them;
read through pyarrow.

Rows are numbered from 1 over all files of the source, in the order of their names. Only the columns
that are asked for are read, a batch of rows at a time, so the pictures or reasoning traces in other
columns cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zppo.data.sources.base import RawRow, Source
from zppo.data.sources.layouts import (
    ONE_IMAGE,
    Columns,
    Wanted,
    check_columns,
    settle,
    top_level,
)
from zppo.errors import UserError, first_line

BATCH_ROWS = 1024
BATCH_BYTES = 2**22
"""Rows are read so many at a time, fewer where they are large: rows with pictures."""
SUFFIXES = (".parquet", ".arrow")
NO_PIXELS = {"bytes": b"", "path": None}
"""Stands for a picture in a column that is not read."""


def open_table(file: Path, wanted: Wanted) -> Source:
    """Open one file. Raises UserError if it is no table or lacks a column."""
    return open_tables(file, file.stem, [file], wanted)


def open_tables(name: Path, stem: str, files: Sequence[Path], wanted: Wanted) -> Source:
    """Open several files as one source that messages call `name`; the first says which layout it
    has. Raises UserError."""
    first = _schema(files[0])
    columns = settle(wanted, first.names)
    for file in files:
        schema = _schema(file)
        _refuse_twice(file, schema.names)
        check_columns(file, columns, list(_paths(schema)))
    return Source(
        name=str(name),
        stem=stem,
        folder=files[0].parent,
        unit="row",
        rows=_numbered(files, columns),
        columns=columns,
        pictured=_pictured(first, columns),
    )


def _pictured(schema: Any, columns: Columns) -> dict[str, Any]:
    """See `Source.pictured`: which of its rows has one is not looked at. A table whose pictures are
    read may have others, but for `image` beside `images`."""
    read = columns.names["images"]
    return {
        one.name: NO_PIXELS
        for one in schema
        if one.name != read
        and (read not in schema.names or one.name == ONE_IMAGE)
        and _is_pictures(one.type)
    }


def _is_pictures(kind: Any) -> bool:
    """Whether a type is that of pictures as the Hub has them: `{bytes, path}`, or a list of it."""
    import pyarrow as pa

    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {one.name for one in kind} == set(NO_PIXELS)


def table_columns(file: Path) -> list[str]:
    """Every column of a table, nested ones by their paths. Raises UserError if it is no table."""
    schema = _schema(file)
    _refuse_twice(file, schema.names)
    return list(_paths(schema))


def table_rows(file: Path, wanted: list[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of one table behind the first `start`, with the `wanted` columns. Raises UserError
    where it is damaged."""
    for batch in _batches(file, wanted, start):
        yield from _as_rows(file, batch)


def _schema(file: Path) -> Any:
    with _readable(file):
        return READERS[file.suffix].schema(file)


def _refuse_twice(file: Path, names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{file}: has the column {twice!r} twice; expected each name once")


def _paths(fields: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """Every column of a schema, nested ones by their paths."""
    import pyarrow as pa

    for field in fields:
        yield f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            inner = [field.type.field(index) for index in range(field.type.num_fields)]
            yield from _paths(inner, f"{prefix}{field.name}.")


def _numbered(files: Iterable[Path], columns: Columns) -> Iterator[RawRow]:
    """Rows with the wanted columns, or with all."""
    wanted = None if columns.every else list(columns.names.values())
    rows = (
        row for file in files for batch in _batches(file, wanted) for row in _as_rows(file, batch)
    )
    return enumerate(rows, start=1)


def _batches(file: Path, wanted: list[str] | None, start: int = 0) -> Iterator[Any]:
    """Record batches of the rows behind the first `start`."""
    with _readable(file):
        for skipped, batch in READERS[file.suffix].batches(file, wanted, start):
            if skipped + batch.num_rows > start:
                yield batch.slice(max(0, start - skipped))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow says about a damaged file into one sentence."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = {".parquet": "a Parquet", ".arrow": "an Arrow"}[file.suffix]
        reason = first_line(error)
        raise UserError(f"{file}: cannot be read as {kind} file ({reason})") from None


def _as_rows(file: Path, batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch as dictionaries of plain values. Raises UserError for a column
    with values that Python does not have: times of nanoseconds, text that is none."""
    names, values = batch.schema.names, []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            values.append(_plain(column))
        except Exception as error:  # pyarrow says so in many ways
            raise UserError(
                f"{file}: the column {name!r} ({column.type}) cannot be read "
                f"({first_line(error)}); mend it, or leave it out of the file"
            ) from None
    return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def _plain(column: Any) -> list[Any]:
    """Values of a column. Narrow floats, nested ones too, keep the digits they were written with:
    0.1, not 0.10000000149."""
    import pyarrow as pa

    narrow, texts, wide = (
        _with_floats(column.type, leaf) for leaf in (pa.float32(), pa.string(), pa.float64())
    )
    if texts != wide:
        column = column.cast(narrow).cast(texts).cast(wide)
    values: list[Any] = column.to_pylist()
    return values


def _with_floats(kind: Any, leaf: Any) -> Any:
    """A type with `leaf` in the place of narrow floats, also in lists and structs."""
    import pyarrow as pa

    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return leaf
    if pa.types.is_dictionary(kind):
        return _with_floats(kind.value_type, leaf)
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_with_floats(one.type, leaf)) for one in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_with_floats(kind.value_type, leaf)))
    return kind


# ---- the two formats -----------------------------------------------------------------------------


class _Parquet:
    @staticmethod
    def schema(file: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.read_schema(file)

    @staticmethod
    def batches(file: Path, wanted: list[str] | None, start: int) -> Iterator[tuple[int, Any]]:
        """(rows before it, batch), from the row group on in which row `start` lies."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            # A nested column is read alone, without its neighbours.
            present = [name for name in wanted or names if top_level(name, names) in names]
            before = 0
            for index in range(table.num_row_groups):
                group = table.metadata.row_group(index)
                if before + group.num_rows > start:
                    size = _batch_rows(group.total_byte_size, group.num_rows)
                    inner = before
                    for batch in table.iter_batches(size, row_groups=[index], columns=present):
                        yield inner, batch
                        inner += batch.num_rows
                before += group.num_rows


class _Arrow:
    @staticmethod
    def schema(file: Path) -> Any:
        with _arrow_reader(file) as reader:
            return reader().schema

    @staticmethod
    def batches(file: Path, wanted: list[str] | None, start: int) -> Iterator[tuple[int, Any]]:
        """(rows before it, batch)."""
        before = 0
        with _arrow_reader(file) as reader:
            for batch in _record_batches(reader()):
                names = batch.schema.names
                tops = dict.fromkeys(top_level(name, names) for name in wanted or names)
                chosen = batch.select([name for name in tops if name in names])
                size = _batch_rows(chosen.nbytes, chosen.num_rows)
                for first in range(0, chosen.num_rows, size):
                    yield before + first, chosen.slice(first, size)
                before += chosen.num_rows


def _batch_rows(size: int, rows: int) -> int:
    """Rows to read at a time where `rows` of them have `size` bytes."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


@contextmanager
def _arrow_reader(file: Path) -> Iterator[Callable[[], Any]]:
    """A maker of readers over a mapped file: of a stream, as `datasets` writes it, or of a
    random-access file."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:

        def open_reader() -> Any:
            try:
                return pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_file(source)

        yield open_reader


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "get_batch"):
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


READERS: dict[str, type[_Parquet] | type[_Arrow]] = {".parquet": _Parquet, ".arrow": _Arrow}
