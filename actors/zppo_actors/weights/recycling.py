"""Weight files are written over: the file of a version that was released becomes that of a later
one.

To fill new pages of shared memory and to give them back costs a multiple of a copy of what they
hold. So a released file stays as the *spare* of its folder, at most one, under a name that nobody
reads, and the next version is written onto its pages. The invariant: what is in a file that was a
version changes only while one writer holds the file's lock alone, and whoever reads holds the same
lock with other readers, for as long as the mapping lives. So no reader sees a change, however late
it is. A spare that is still read is not waited for: it loses its name, its pages go with the last
mapping, and a new file is made. Locks of processes that died are gone with them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

SPARE = ".policy-spare"
"""The file name of a folder's spare."""
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system without locks says. There no writer gets one either, so nothing is written
over."""


def no_room(folder: Path, what: str, error: OSError, where: str = "") -> OSError:
    """What is said where `folder` cannot take `what`. `where` says on which host it is, if that is
    not plain."""
    return OSError(
        f"{folder} has no room for {what} ({error.strerror}); set ZPPO_RUNTIME_DIR {where}to a "
        "larger folder, or lower scheduler.max_staleness"
    )


def set_aside(path: Path) -> None:
    """Nobody needs the file at `path` any more: it is the folder's spare now, in place of an
    earlier one. Silent if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(SPARE))


def begun(aside: Path) -> BinaryIO:
    """A file named `aside`, which must not exist, to be written: the spare with its old bytes if
    there is one that nobody reads, else a new one, whose name nobody knows. A spare is locked until
    it is `written`; whoever writes sets its length."""
    try:
        # Of several writers only one gets the name, and with it the file.
        aside.with_name(SPARE).rename(aside)
    except FileNotFoundError:
        return aside.open("xb+")
    file = aside.open("r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody still reads it, or there are no locks here
        file.close()
        aside.unlink()
        return aside.open("xb+")
    return file


def written(file: BinaryIO) -> None:
    """Nothing more is written to a file of `begun`: readers may lock it, though a duplicate of its
    descriptor, and so of the lock, may live on in a mapping or in a process that was forked."""
    with contextlib.suppress(OSError):  # no locks here
        fcntl.flock(file, fcntl.LOCK_UN)


def opened(path: Path) -> BinaryIO:
    """The file at `path`, to be read, unbuffered. Nobody writes to it until it is closed and no
    mapping of it is left: a duplicate of its descriptor lives in each, and the lock with it.

    Raises OSError if it is not there, or was released while it was opened.
    """
    file = path.open("rb", buffering=0)
    try:
        _lock_with_readers(file)
        # The lock may have come after the file had become another version's.
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(f"{path} was replaced while it was opened")
    except OSError:
        file.close()
        raise
    return file


def _lock_with_readers(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
