"""Brings policy versions from the trainer's host into this host's runtime folder, one at a time.

Invariant: a file under its final name is whole, and every tensor of it has the digest of the
manifest, so engines find here what they would find on the trainer's host. Until then it has
another name; what has come of it outlives a cut line.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
from pathlib import Path

import xxhash

from zppo_actors.weights.fetch import Chunk, WeightFetch
from zppo_actors.weights.layout import file_size, weight_path
from zppo_actors.weights.line import Line, LineCut, connect
from zppo_actors.weights.recycling import begun, no_room, opened, written
from zppo_protocol.messages import WeightSource
from zppo_protocol.values import PolicyManifest, TensorEntry

PARTIAL = ".part"
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux: make all pages of a range writable now."""
SILENT_SECONDS = 60.0
"""A line on which nothing comes for so long is taken for cut."""
RETRY_SECONDS = (0.1, 5.0)
"""First and longest pause before a line is opened again."""

log = logging.getLogger("zppo.weights")


class Fetcher:
    """The versions of one host. One thread only: `step` does a little at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._source: WeightSource | None = None
        self._wanted: _Arrival | None = None
        self._here: PolicyManifest | None = None
        self._line: Line | None = None
        self._pause, self._next_try = RETRY_SECONDS[0], 0.0
        self.bytes_total = 0
        """bytes that have come over the line"""
        for path in folder.glob(f"*{PARTIAL}"):  # of a fetcher that has died
            path.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """Whether a version is on its way."""
        return self._wanted is not None or self._here is not None

    def come_from(self, source: WeightSource) -> None:
        """Fetch from here from now on."""
        if source != self._source:
            self._source = source
            self._hang_up()
            self._pause, self._next_try = RETRY_SECONDS[0], 0.0

    def want(self, manifest: PolicyManifest) -> None:
        """Fetch this version, and drop another one that is on its way.

        Raises ValueError for a manifest that contradicts itself, OSError if there is no room.
        """
        if self._wanted is not None and self._wanted.fetch.manifest == manifest:
            return
        self._drop()
        if _is_here(self._folder, manifest):
            self._here = manifest
        else:
            self._wanted = _Arrival(self._folder, manifest)

    def step(self, seconds: float) -> PolicyManifest | None:
        """Work for about `seconds`; returns the version that is whole now, if it became so.

        Raises ValueError if it cannot be had as the manifest says; then it is given up.
        """
        wanted, here, self._here = self._wanted, self._here, None
        if wanted is None:
            return here
        try:
            if not wanted.fetch.done:
                self._advance(wanted, seconds)
            if not wanted.fetch.done:
                return None
        except ValueError:
            self._drop()
            raise
        self._wanted = None
        wanted.finish()
        return wanted.fetch.manifest

    def close(self) -> None:
        """Hang up and drop what is not whole."""
        self._drop()
        self._hang_up()

    # ---- the line --------------------------------------------------------------------------------

    def _advance(self, wanted: _Arrival, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            while not wanted.fetch.done and (left := deadline - time.monotonic()) > 0:
                line = self._open_line()
                if line is None:
                    # Until it is time for another try, or somebody says where.
                    pause = self._next_try - time.monotonic() if self._source else left
                    time.sleep(min(left, max(0.0, pause)))
                    continue
                for chunk in wanted.fetch.requests():
                    line.ask(wanted.version, chunk)
                    wanted.expect(chunk)
                arrived = line.receive(wanted.version, wanted.memory, left)
                if arrived is not None:
                    self.bytes_total += arrived.size
                    self._pause = RETRY_SECONDS[0]
                    wanted.check(wanted.fetch.arrived(arrived))
                elif time.monotonic() - line.alive > SILENT_SECONDS:
                    raise LineCut(f"nothing came for {SILENT_SECONDS:g} s")
        except LineCut as error:
            self._lose_line(error)

    def _open_line(self) -> Line | None:
        if self._line is None and self._source is not None and self._next_try <= time.monotonic():
            self._line = connect(self._source)
        return self._line

    def _lose_line(self, error: LineCut) -> None:
        log.warning("the line for weights is cut, next try in %.1f s: %s", self._pause, error)
        self._hang_up()
        self._next_try = time.monotonic() + self._pause
        self._pause = min(RETRY_SECONDS[1], 2 * self._pause)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._wanted is not None:
            self._wanted.fetch.cut()

    def _drop(self) -> None:
        if self._wanted is not None:
            # Answers that are under way belong to it, so the line goes with it.
            self._hang_up()
            self._wanted.discard()
            self._wanted = None


class _Arrival:
    """A version in the making: its plan, its file and its memory."""

    def __init__(self, folder: Path, manifest: PolicyManifest) -> None:
        self.fetch = WeightFetch(manifest)
        self.version = manifest.version
        self._final = weight_path(folder, manifest.version)
        self._partial = self._final.with_name(self._final.name + PARTIAL)
        self._partial.unlink(missing_ok=True)
        self._file = begun(self._partial)
        try:
            self._file.truncate(self.fetch.size)
            # Room for all of it now: a write to memory that turns out not to be there kills.
            os.posix_fallocate(self._file.fileno(), 0, self.fetch.size)
        except OSError as error:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            raise no_room(folder, f"{self.fetch.size} bytes", error, "there ") from error
        self._mapped = mmap.mmap(self._file.fileno(), self.fetch.size)
        self.memory = memoryview(self._mapped)

    def expect(self, chunk: Chunk) -> None:
        """Make the pages of a chunk that was asked for writable in one go."""
        with contextlib.suppress(OSError):  # kernels before 5.14 cannot; then pages come one by one
            self._mapped.madvise(POPULATE_WRITE, chunk.start, chunk.size)

    def check(self, tensors: list[TensorEntry]) -> None:
        """Ask again for those whose bytes are wrong. Raises ValueError if there is no end to it."""
        for entry in tensors:
            if not _is_right(self.memory, entry):
                log.warning("tensor %r of version %d came damaged", entry.name, self.version)
                self.fetch.wrong(entry)

    def finish(self) -> None:
        """All is here: give the file its name."""
        self.memory.release()
        written(self._file)
        self._file.close()
        self._partial.rename(self._final)

    def discard(self) -> None:
        """Leave nothing behind."""
        self.memory.release()
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _is_here(folder: Path, manifest: PolicyManifest) -> bool:
    """Whether the version lies whole in `folder`, brought by a fetcher that has died since."""
    try:
        with opened(weight_path(folder, manifest.version)) as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return False
    with memory:
        return len(memory) == file_size(manifest) and all(
            _is_right(memory, entry) for entry in manifest.tensors
        )


def _is_right(memory: memoryview, entry: TensorEntry) -> bool:
    with memory[entry.start : entry.start + entry.size] as raw:
        return xxhash.xxh3_128_hexdigest(raw) == entry.digest
