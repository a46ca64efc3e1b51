"""Parquet and Arrow files, and the folders in which the `datasets` library and the Hub keep them;
read through pyarrow.

Rows are numbered from 1 over all files of the source, in the order of their names. Only the columns
that are asked for are read, a batch of rows at a time, so the pictures or reasoning traces in other
columns cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zppo.data.sources.base import Columns, RawRow, Source
from zppo.errors import UserError, first_line, nearest

BATCH_ROWS = 1024
SUFFIXES = (".parquet", ".arrow")


def open_table(file: Path, columns: Columns) -> Source:
    """Open one file. Raises UserError if it is no table or lacks a column."""
    return open_tables(file, file.stem, [file], columns)


def open_tables(name: Path, stem: str, files: Sequence[Path], columns: Columns) -> Source:
    """Open several files as one source that messages call `name`. Raises UserError."""
    for file in files:
        _check_columns(file, columns)
    return Source(
        name=str(name),
        stem=stem,
        folder=files[0].parent,
        unit="row",
        rows=_numbered(files, list(columns.names.values())),
        columns=columns.names,
    )


def _numbered(files: Iterable[Path], wanted: list[str]) -> Iterator[RawRow]:
    rows = (row for file in files for batch in _batches(file, wanted) for row in _as_rows(batch))
    return enumerate(rows, start=1)


def _check_columns(file: Path, columns: Columns) -> None:
    with _readable(file):
        names = READERS[file.suffix].names(file)
    for field, column in columns.required.items():
        if column not in names:
            raise UserError(
                f"{file}: there is no column {column!r} for "
                f"data.fields.{field}{nearest(column, names)}; name it in data.fields"
            )


def _batches(file: Path, wanted: list[str]) -> Iterator[Any]:
    with _readable(file):
        yield from READERS[file.suffix].batches(file, wanted)


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


def _as_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch as dictionaries of plain values."""
    values = [_plain(batch.column(index)) for index in range(batch.num_columns)]
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*values, strict=True))


def _plain(column: Any) -> list[Any]:
    """Values of a column. Narrow floats keep the digits they were written with: 0.1, not
    0.10000000149."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        texts = column.cast(pa.float32()).cast(pa.string()).to_pylist()
        return [None if text is None else float(text) for text in texts]
    values: list[Any] = column.to_pylist()
    return values


# ---- the two formats -----------------------------------------------------------------------------


class _Parquet:
    @staticmethod
    def names(file: Path) -> list[str]:
        import pyarrow.parquet as pq

        names: list[str] = pq.read_schema(file).names
        return names

    @staticmethod
    def batches(file: Path, wanted: list[str]) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            present = [name for name in wanted if name in table.schema_arrow.names]
            yield from table.iter_batches(BATCH_ROWS, columns=present)


class _Arrow:
    @staticmethod
    def names(file: Path) -> list[str]:
        with _arrow_reader(file) as reader:
            names: list[str] = reader().schema.names
            return names

    @staticmethod
    def batches(file: Path, wanted: list[str]) -> Iterator[Any]:
        with _arrow_reader(file) as reader:
            for batch in _record_batches(reader()):
                chosen = batch.select([name for name in wanted if name in batch.schema.names])
                for start in range(0, chosen.num_rows, BATCH_ROWS):
                    yield chosen.slice(start, BATCH_ROWS)


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
