"""The hand that writes a process's part of the timeline (`zppo.records.timeline`).

Invariant: whoever works never waits for the disk, and nothing here can fail it. A span is one
append to a queue; a thread of its own writes what has come together every `FLUSH_SECONDS`. What
comes faster than `MOST_SPANS` in that time is merged first, which bounds the file's growth whatever
an actor does. A disk that is full or slow costs spans, which are counted, and nothing else.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zppo.records.atomic_file import written_whole
from zppo.records.timeline import (
    LONGEST_NAME,
    MAX_BYTES,
    MICRO,
    OF_TASKS,
    SAMPLE,
    Life,
    Room,
    Span,
    decoded,
    encoded,
    merged,
    thinned,
    window_of,
)

FLUSH_SECONDS = 1.0
"""A killed process loses the spans of so long."""
CLOSE_SECONDS = 5.0
"""A disk that does not answer is waited for so long at the end; on a busy machine one that does may
take more than a second."""
MOST_SPANS = 64
"""of one flush, or one of each kind; at about 70 bytes each, 4.5 kB/s at the very most"""
MOST_WAITING = 65_536
"""Spans that wait for a disk that does not answer; later ones are dropped."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger("zppo.timeline")


def begin_life(run_id: str, actor: str, incarnation: int) -> Life:
    """What this process says of itself, with its two clocks read at once."""
    return Life(run_id, actor, incarnation, os.getpid(), boot(), time.monotonic(), time.time())


def boot() -> str:
    """What names the monotonic clock of this host."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux: the host's name is the next best
        return os.uname().nodename


class Timeline:
    """Takes spans from any thread. Without a `folder` it keeps nothing."""

    def __init__(
        self,
        folder: Path | None = None,
        life: Life | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._clock, self._max_bytes = clock, max_bytes
        self._waiting: deque[Room | Span] = deque()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused = False
        self.lost = 0
        """spans that were dropped"""
        self.began = clock()
        if folder is not None and life is not None:
            self._path, self._life = folder / f"{life.actor}.jsonl", life
            self._head: Life | None = life
            self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)
            self._thread.start()

    def now(self) -> float:
        """Seconds of the clock that spans are given in."""
        return self._clock()

    def span(
        self,
        kind: str,
        begin: float,
        end: float | None = None,
        *,
        step: int = -1,
        what: str = "",
        size: float = 1,
    ) -> None:
        """Something was done from `begin` to `end` (now), in seconds of `now`."""
        if self._thread is None:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.lost += 1
            return
        low = round((begin - self._life.monotonic) * MICRO)
        high = round(((self._clock() if end is None else end) - self._life.monotonic) * MICRO)
        name = what[:LONGEST_NAME]
        self._waiting.append(Span(kind, low, high, step, name, size, 1, high - low))

    def task(self, kind: str, task_id: str, begin: float, size: int) -> None:
        """A task was in hand from `begin` until now; `size` in sequences or responses."""
        name = OF_TASKS.get(kind, SAMPLE)
        self.span(name, begin, step=window_of(task_id), what=task_id, size=size)

    @contextmanager
    def during(
        self, kind: str, *, step: int = -1, what: str = "", size: float = 1
    ) -> Iterator[None]:
        """The span of a block, also of one that raises."""
        begin = self._clock()
        try:
            yield
        finally:
            self.span(kind, begin, step=step, what=what, size=size)

    def room(self, capacity: int) -> None:
        """The engine of this process takes so many sequences at once."""
        if self._thread is not None:
            self._waiting.append(Room(capacity))

    def close(self) -> None:
        """Write what is left, within `CLOSE_SECONDS`."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self.lost:
                log.warning("%s: spans lost: %d", self._path, self.lost)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        """consumes: what `span` and `room` left. produces: lines of the file. waits for: the next
        flush. is unblocked by: the clock, `close`."""
        while not self._ended.wait(FLUSH_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not waiting and self._head is None:
            return
        rooms = [line for line in waiting if isinstance(line, Room)]
        spans = [line for line in waiting if isinstance(line, Span)]
        head = [] if self._head is None else [self._head]
        try:
            self._append(encoded([*head, *rooms, *merged(spans, MOST_SPANS)]))
            self._head = None
        except OSError as error:
            if not self._refused:
                log.warning("%s: cannot be written (%s)", self._path, error.strerror)
            self._refused = True
            self.lost += len(spans)
            # Whatever was written of it is ended by the empty line in front of the life.
            self._head = self._life

    def _append(self, data: bytes) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            size = file.tell()
        if size > self._max_bytes:
            lines, _ = decoded(self._path.read_bytes())
            with written_whole(self._path) as whole:
                whole.write(encoded(thinned(lines)))
