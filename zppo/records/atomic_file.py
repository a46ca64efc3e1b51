"""Files that are whole or absent: written aside, then renamed into place. A device, a pipe or
another thing that is no file is written to as it is, and so is what `/dev/stdout` stands for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"
MOST_LINKS = 40
"""One behind the other; Linux follows as many."""


def aside_of(path: Path) -> Path:
    """Where `path` is while it is being written: hidden, in the same folder."""
    return path.with_name(f".{path.name}{SUFFIX}")


def _new(aside: Path) -> BinaryIO:
    return aside.open("xb")


def _as_it_is(path: Path) -> BinaryIO | None:
    """What is to be written to and not replaced, opened; None for a file, or where nothing is."""
    number = _descriptor(path) if path.is_symlink() else None
    if number is not None:
        # Opened anew, a file would be written from its begin, over what the descriptor has written.
        return os.fdopen(os.dup(number), "wb")
    return path.open("wb") if path.exists() and not path.is_file() else None


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that a link such as `/dev/stdout` or `/dev/fd/3` is."""
    own = Path("/dev/fd").resolve()
    for _ in range(MOST_LINKS):
        if path.parent.resolve() == own and path.name.isdigit():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


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
    if (there := _as_it_is(path)) is not None:
        with there as file:
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
