"""Files that are whole or absent: written aside, then renamed into place. A device, a pipe or
another thing that is no file is written to as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"


def aside_of(path: Path) -> Path:
    """Where `path` is while it is being written: hidden, in the same folder."""
    return path.with_name(f".{path.name}{SUFFIX}")


def _new(aside: Path) -> BinaryIO:
    return aside.open("xb")


@contextmanager
def written_whole(
    path: Path, *, synced: bool = False, begun: Callable[[Path], BinaryIO] = _new
) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends; nothing changes if the
    block fails. Raises OSError, for a folder too.

    What lies aside already, from a writer that was killed or as a link, is removed and never
    written to. `synced` puts its content on the disk first, so that not even a power cut leaves an
    empty file under the name. `begun` makes the file aside, where it need not be a new one.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    aside = aside_of(path)
    try:
        aside.unlink(missing_ok=True)
        with begun(aside) as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
