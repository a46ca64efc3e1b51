"""What the files of this host's actors have become, in parts that fit into a report.

A log may grow faster than a report can carry it: then its older part is left out. What has been
sent of a long log is cut off the file, because the files lie in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from zppo_protocol.values import FilePart

PART_BYTES = 1 << 17
MOST_PARTS = 16
"""Files that one report speaks of; the others' turn comes with the next."""
MOST_BEHIND = 1 << 20
LONGEST_LOG = 1 << 23
"""Bytes of a log that are kept here once they are sent."""


class Tail:
    """One file. Places in it are counted from the beginning of what was ever written. It is kept
    open, so that no other file can have its inode while that is what tells them apart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self._file: BinaryIO | None = None
        self._cut = 0

    def part(self, name: str, received: tuple[int, int]) -> FilePart | None:
        """The next part behind what the other side has; None: there is nothing new."""
        try:
            file = self._current()
            size = os.fstat(file.fileno()).st_size
            end = self._cut + size
            start = received[1] if received[0] == self.number else 0
            if end - start > MOST_BEHIND and self.path.suffix == ".log":
                start = end - PART_BYTES
            start = max(start, self._cut)
            data = os.pread(file.fileno(), PART_BYTES, start - self._cut)
            if received == (self.number, end):
                self._shorten(size)
        except OSError:
            return None
        return FilePart(name, self.number, start, data) if data else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _current(self) -> BinaryIO:
        """The file that has the name now; a new number, if it is another than before."""
        if self._file is not None:
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return self._file
            self._file.close()
            self._file, self.number, self._cut = None, self.number + 1, 0
        self._file = self.path.open("rb", buffering=0)
        return self._file

    def _shorten(self, size: int) -> None:
        """All is sent: let go of it where it has become long. Writers append, so they go on at the
        beginning."""
        if self.path.suffix == ".log" and size > LONGEST_LOG:
            os.truncate(self.path, 0)
            self._cut += size


class Tails:
    """The files of a run folder, given out in turn."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._tails: dict[str, Tail] = {}

    def parts(self, received: Mapping[str, tuple[int, int]]) -> list[FilePart]:
        """What is new in them, as far as a report goes."""
        for pattern in ("logs/*.log", "timeline/*.jsonl"):
            for path in self._run_dir.glob(pattern):
                name = str(path.relative_to(self._run_dir))
                self._tails.setdefault(name, Tail(path))
        parts: list[FilePart] = []
        for name in list(self._tails):
            if len(parts) == MOST_PARTS:
                break
            part = self._tails[name].part(name, received.get(name, (0, 0)))
            if part is not None:
                parts.append(part)
                self._tails[name] = self._tails.pop(name)  # behind all others
        return parts

    def close(self) -> None:
        """Let go of all files."""
        for tail in self._tails.values():
            tail.close()
