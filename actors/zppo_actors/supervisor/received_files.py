"""Files of the run directory whose writers run on another host: logs and timelines, in parts.

Invariant: nothing but `logs/NAME.log` and `timeline/NAME.jsonl` of the host's own actors is
written, and no file of one attempt grows by more than `MOST_BYTES`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from zppo.records.timeline import TIMELINE
from zppo_protocol.values import FilePart

LOGS = "logs"
MOST_BYTES = 64 << 20

log = logging.getLogger("zppo.supervisor")


class ReceivedFiles:
    """What one host writes. `received` says of each file the number of its part and the bytes of it
    that have come or were left out."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._allowed: set[str] = set()
        self._first: dict[str, int] = {}
        """Bytes that were there when the attempt began,"""
        self._base: dict[str, int] = {}
        """and when this agent did."""
        self.received: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """An attempt begins."""
        self._first.clear()
        self.begin_anew()

    def begin_anew(self) -> None:
        """The host begins its files anew; what has come stays before them."""
        self.received.clear()
        self._base.clear()

    def allow(self, actor: str) -> None:
        """The host runs this actor."""
        self._allowed |= {f"{LOGS}/{actor}.log", f"{TIMELINE}/{actor}.jsonl"}

    def take(self, part: FilePart) -> None:
        """Append what is new. A disk that does not take it costs these bytes, not the run."""
        number, size = self.received.get(part.path, (0, 0))
        if part.path not in self._allowed or part.number < number:
            return
        if part.number > number:  # written anew
            size = 0
        if part.start < size:
            return  # it has come already, and the word of it was lost
        try:
            self._append(part, size)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", part.path, error.strerror)
        self.received[part.path] = (part.number, part.start + len(part.data))

    def _append(self, part: FilePart, size: int) -> None:
        path = self._run_dir / part.path
        path.parent.mkdir(exist_ok=True)
        data = part.data
        if part.start > size and path.suffix == ".log":
            data = f"\n[{part.start - size} bytes are left out]\n".encode() + data
        with path.open("ab") as file:
            there = os.fstat(file.fileno()).st_size
            base = self._base.setdefault(part.path, there)
            if size == 0 and part.number > 0:
                file.truncate(base)
            first = self._first.setdefault(part.path, there)
            if file.seek(0, os.SEEK_END) + len(data) - first <= MOST_BYTES:
                file.write(data)
