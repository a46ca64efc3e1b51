"""What of a policy version is still to be asked for, what is on its way, and what is here (pure).

A version is fetched as chunks of its file. A few are in flight at once, so that the line is never
idle; they may come in any order. Invariants: a chunk is asked for again only after a cut or because
a tensor was wrong, `done` says that every tensor has been handed out for its check since the last
of its bytes came, and no more than `in_flight` chunks are on their way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from zppo_actors.weights.layout import file_size
from zppo_protocol.values import PolicyManifest, TensorEntry

CHUNK_BYTES = 1 << 22
IN_FLIGHT = 4
TRIES = 3
"""So often the bytes of one tensor may be wrong before it is given up."""


@dataclass(frozen=True)
class Chunk:
    """`size` bytes of a weight file from `start`."""

    start: int
    size: int


class WeightFetch:
    """One version on its way to this host."""

    def __init__(
        self, manifest: PolicyManifest, chunk_bytes: int = CHUNK_BYTES, in_flight: int = IN_FLIGHT
    ) -> None:
        """Raises ValueError for a manifest that contradicts itself, or that is of no bytes."""
        self.manifest, self.size = manifest, file_size(manifest)
        if not self.size:
            raise ValueError("its tensors have no bytes")
        self._chunk_bytes, self._in_flight = chunk_bytes, in_flight
        count = -(-self.size // chunk_bytes)
        self._todo, self._asked, self._here = deque(range(count)), set[int](), set[int]()
        self._count = count
        self._unchecked = {entry.name: entry for entry in manifest.tensors}
        self._wrong: dict[str, int] = {}
        self._within: dict[int, list[TensorEntry]] = {}
        for entry in manifest.tensors:
            for index in self._span(entry):
                self._within.setdefault(index, []).append(entry)

    @property
    def done(self) -> bool:
        """Whether all bytes are here and every tensor has been handed out for its check."""
        return len(self._here) == self._count and not self._unchecked

    def requests(self) -> list[Chunk]:
        """What to ask for now; it counts as on its way from here on."""
        free = min(self._in_flight - len(self._asked), len(self._todo))
        indices = [self._todo.popleft() for _ in range(free)]
        self._asked.update(indices)
        return [self._chunk(index) for index in indices]

    def arrived(self, chunk: Chunk) -> list[TensorEntry]:
        """A chunk is in its place. Returns the tensors that are whole now, to be checked; those
        that fail go to `wrong`. Raises ValueError for a chunk that was not asked for."""
        index = chunk.start // self._chunk_bytes
        if index not in self._asked or chunk != self._chunk(index):
            raise ValueError(
                f"bytes {chunk.start} to {chunk.start + chunk.size} were not asked for"
            )
        self._asked.remove(index)
        self._here.add(index)
        whole = [entry for entry in self._within.get(index, []) if self._is_whole(entry)]
        for entry in whole:
            self._unchecked.pop(entry.name, None)
        return whole

    def wrong(self, entry: TensorEntry) -> None:
        """The bytes of a tensor are not those of its digest: they are asked for again. Raises
        ValueError if they have been wrong too often."""
        self._wrong[entry.name] = tries = self._wrong.get(entry.name, 0) + 1
        if tries >= TRIES:
            raise ValueError(f"tensor {entry.name!r} came with other bytes {tries} times")
        for index in self._span(entry):
            if index in self._here:
                self._here.remove(index)
                self._todo.append(index)
            for other in self._within[index]:
                self._unchecked[other.name] = other

    def cut(self) -> None:
        """The line is gone, and what was on its way with it. What is here stays."""
        self._todo.extendleft(sorted(self._asked, reverse=True))
        self._asked.clear()

    def _chunk(self, index: int) -> Chunk:
        start = index * self._chunk_bytes
        return Chunk(start, min(self._chunk_bytes, self.size - start))

    def _span(self, entry: TensorEntry) -> range:
        """The chunks that hold bytes of a tensor; one without bytes is checked with a neighbour."""
        first = min(entry.start // self._chunk_bytes, self._count - 1)
        last = (entry.start + max(entry.size, 1) - 1) // self._chunk_bytes
        return range(first, max(first, min(last, self._count - 1)) + 1)

    def _is_whole(self, entry: TensorEntry) -> bool:
        return self._here.issuperset(self._span(entry))
