"""Signs of life of processes that do not speak: processor time used and bytes moved, each with all
that the process has spawned.

A process that loads a model for an hour says nothing meanwhile, and neither does one that was
stopped; what they use tells them apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

import psutil

PROCESSOR_SECONDS = 0.1
MOVED_BYTES = 1 << 20
"""Less than both is what an idle process uses while it waits; it adds up until it counts."""


Children: TypeAlias = Mapping[int, Sequence[int]]
Usage: TypeAlias = tuple[float, int]
"""Processor seconds, and bytes read and written, so far."""


class Vitals:
    """When each process last did something, in seconds of the caller's clock; a process is known
    by any key."""

    def __init__(self) -> None:
        self._used: dict[Hashable, Usage] = {}
        self._moved: dict[Hashable, float] = {}

    def sample(self, used_now: Mapping[Hashable, Usage], now: float) -> None:
        """Look at these processes; others are forgotten. One that is gone counts as still."""
        self._used = {key: self._used.get(key, used) for key, used in used_now.items()}
        self._moved = {key: self._moved.get(key, now) for key in used_now}
        for key, used in used_now.items():
            before = self._used[key]
            if used[0] - before[0] >= PROCESSOR_SECONDS or used[1] - before[1] >= MOVED_BYTES:
                self._used[key], self._moved[key] = used, now
            elif used < before:  # a child that had used much has ended
                self._used[key] = used

    def still_for(self, key: Hashable, now: float) -> float:
        """Seconds since the process was last seen doing something, or since it is known."""
        return now - self._moved.get(key, now)


def children_by_parent() -> Children:
    """The process ids of all children of every process of this machine, in one look."""
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process.pid)
    return children


def usage(pid: int, children: Children) -> Usage:
    """(processor seconds, bytes read and written) of a process and all its descendants so far."""
    seconds, size = _one(pid)
    for child in children.get(pid, ()):
        of_child = usage(child, children)
        seconds, size = seconds + of_child[0], size + of_child[1]
    return seconds, size


def _one(pid: int) -> Usage:
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        seconds = times.user + times.system
    except psutil.Error:
        return 0.0, 0
    try:
        moved = process.io_counters()
    except (psutil.Error, AttributeError):  # not every system counts bytes, or shows them
        return seconds, 0
    # Characters count what came out of the page cache, bytes what a mapped file was read for.
    chars = getattr(moved, "read_chars", 0) + getattr(moved, "write_chars", 0)
    return seconds, chars + moved.read_bytes + moved.write_bytes
