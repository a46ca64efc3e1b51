"""The workers of one pool by policy version and free credit, in O(versions + log workers) a choice.

One heap a version, with lazy deletion: whatever changes of a worker is a new entry, and an entry
counts only while it says what is so now. Once most entries are out of date, all are made anew, so
memory stays linear in the workers and the work for each change constant on average, but for the
logarithm.
"""

from __future__ import annotations

import functools
import heapq
from typing import TypeAlias

Entry: TypeAlias = tuple[int, tuple[int, ...], str]
"""(-credit, the name's rank, name): the smallest is the worker to choose."""

SLACK = 64
"""Entries out of date that are always tolerated."""


class FreeWorkers:
    """`best` gives the worker with the most free credit; of equal ones that whose name sorts
    last, so that runs repeat."""

    def __init__(self) -> None:
        self._present: dict[str, tuple[int, int]] = {}
        self._heaps: dict[int, list[Entry]] = {}
        self._entries = 0

    def put(self, name: str, version: int, credit: int) -> None:
        """The worker is here, has loaded `version` and has `credit` to spend."""
        if self._present.get(name) == (version, credit):
            return
        self._present[name] = (version, credit)
        self._push(name, version, credit)
        if self._entries > 2 * len(self._present) + SLACK:
            self._renew()

    def remove(self, name: str) -> None:
        self._present.pop(name, None)

    def best(self, min_version: int, cost: int) -> str | None:
        """The worker to choose among those that have loaded `min_version` and can pay `cost`."""
        best: Entry | None = None
        for version in list(self._heaps):
            top = self._top(version) if version >= min_version else None
            if top is not None and (best is None or top < best):
                best = top
        return best[2] if best is not None and -best[0] >= cost else None

    def _top(self, version: int) -> Entry | None:
        """The first entry of a version that is so now; those before it are thrown away."""
        heap = self._heaps[version]
        while heap and self._present.get(heap[0][2]) != (version, -heap[0][0]):
            heapq.heappop(heap)
            self._entries -= 1
        if not heap:
            del self._heaps[version]
            return None
        return heap[0]

    def _push(self, name: str, version: int, credit: int) -> None:
        heapq.heappush(self._heaps.setdefault(version, []), (-credit, _rank(name), name))
        self._entries += 1

    def _renew(self) -> None:
        self._heaps, self._entries = {}, 0
        for name, (version, credit) in self._present.items():
            self._push(name, version, credit)


@functools.cache
def _rank(name: str) -> tuple[int, ...]:
    """Sorts names from the last to the first; the end of a name sorts behind all characters."""
    return (*(-ord(character) for character in name), 1)
