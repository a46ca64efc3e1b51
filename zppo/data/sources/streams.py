"""Files read from front to back, packed or not. Whatever is wrong with one is said with the number
of the line that could not be had."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zppo.errors import UserError, first_line

PACKED = (".gz", ".zst")
MAX_LINE = 2**28
"""Bytes of one line; a packed file may hold a line of any length in a few bytes."""
MAX_WHOLE = 2**31
"""Bytes of a file that has to be in memory at once."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def kind_of_file(file: Path) -> str:
    """The suffix that says what is in it, without how it is packed: `.jsonl` of a.jsonl.gz."""
    return Path(file.stem).suffix if file.suffix in PACKED else file.suffix


def stem_of(file: Path) -> str:
    """The name without suffixes, so that packing a file does not rename its questions."""
    return Path(file.stem).stem if file.suffix in PACKED else file.stem


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line. Raises UserError where the file ends early."""
    line = 0
    with _opened(file) as stream:
        while True:
            with _explained(file, line + 1):
                data = stream.readline(MAX_LINE + 1)
            if not data:
                return
            line += 1
            if len(data) > MAX_LINE:
                raise UserError(
                    f"{file}:{line}: is longer than {MAX_LINE // 2**20} MiB; expected one row a "
                    "line"
                )
            yield line, data.removeprefix(BYTE_ORDER_MARK) if line == 1 else data


def whole_of(file: Path) -> bytes:
    """All bytes of a file. Raises UserError if it is damaged or too large."""
    with _opened(file) as stream, _explained(file, 1):
        data = stream.read(MAX_WHOLE + 1)
    if len(data) > MAX_WHOLE:
        raise UserError(
            f"{file}: is larger than {MAX_WHOLE // 2**30} GiB; expected JSONL, which is read row "
            "by row"
        )
    return data.removeprefix(BYTE_ORDER_MARK)


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedIOBase]:
    with _explained(file, 1):
        stream = _open(file)
    with stream:
        yield stream


def _open(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


@contextmanager
def _explained(file: Path, line: int) -> Iterator[None]:
    """Turn what a reader says about a damaged file into one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if file.suffix not in PACKED:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise UserError(
                f"{file}: cannot be read ({reason}); expected a question file"
            ) from None
        raise UserError(
            f"{file}:{line}: cannot be unpacked from here on ({first_line(error)}); expected a "
            f"whole {file.suffix} file"
        ) from None
