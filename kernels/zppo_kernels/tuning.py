"""How launches of the row kernels are cut: threads, tile, programs and chunk, one small value that
is chosen per architecture and that anyone may override.

    with using_tuning(Tuning(threads=256, vectors=4)):
        ...

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_WARP = 32
_REGISTERS = 65_536  # of one multiprocessor
VECTOR_BYTES = 16
"""The widest access a thread has."""


@dataclass(frozen=True)
class Tuning:
    """threads: of one program, a power of two in whole warps. vectors: 16-byte accesses a thread
    makes for one tile, a power of two; the next tile's are in flight while one is computed.
    programs_per_processor: how many programs share a multiprocessor; each has one row in flight.
    chunk_rows: rows whose logits exist at one time, where memory allows.
    """

    threads: int = 512
    vectors: int = 2
    programs_per_processor: int = 1
    chunk_rows: int = 4096

    def __post_init__(self) -> None:
        if self.threads not in (32, 64, 128, 256, 512, 1024):
            raise ValueError(
                f"threads is {self.threads!r}; expected a power of two from 32 to 1024"
            )
        if self.vectors not in (1, 2, 4, 8):
            raise ValueError(f"vectors is {self.vectors!r}; expected 1, 2, 4 or 8")
        for name in ("programs_per_processor", "chunk_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected at least 1")

    @property
    def registers(self) -> int:
        """Registers a thread may have with all its programs on one multiprocessor."""
        return min(255, _REGISTERS // (self.threads * self.programs_per_processor) // 8 * 8)


@dataclass(frozen=True)
class Tile:
    """The constants of `triton_sweeps`: VECTORS accesses of WIDTH entries for each of THREADS
    threads."""

    vectors: int
    threads: int
    width: int

    @property
    def warps(self) -> int:
        """Warps of the program."""
        return self.threads // _WARP

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"VECTORS": self.vectors, "THREADS": self.threads, "WIDTH": self.width}


# Compute capability (major) -> Tuning. Chosen by counts of compiled instructions and registers, not
# yet by time on a GPU: `benches/kernels.py --sweep` is what measures it.
TUNINGS: dict[int, Tuning] = {8: Tuning(), 9: Tuning(), 10: Tuning()}
_overrides: list[Tuning] = []


@contextmanager
def using_tuning(tuning: Tuning) -> Iterator[None]:
    """Launch everything inside with this tuning, on every device."""
    _overrides.append(tuning)
    try:
        yield
    finally:
        _overrides.pop()


def tuning_for(device: torch.device) -> Tuning:
    """The tuning in force on this device."""
    if _overrides:
        return _overrides[-1]
    if device.type != "cuda":
        return Tuning()
    return TUNINGS.get(torch.cuda.get_device_capability(device)[0], Tuning())


def tile_for(
    vocabulary: int, element_size: int, tuning: Tuning, rows_read: int = 1, is_narrow: bool = False
) -> Tile:
    """The tile of rows of this vocabulary whose widest entries have `element_size` bytes.

    rows_read: rows a program reads side by side; they share the vectors. Narrow rows are read one
    entry at a time, neighbouring threads side by side. A vocabulary smaller than a tile gets fewer
    threads.
    """
    width = 1 if is_narrow else VECTOR_BYTES // element_size
    vectors = max(1, tuning.vectors // rows_read) * (4 if is_narrow else 1)
    needed = -(-vocabulary // (vectors * width))
    threads = min(tuning.threads, max(_WARP, 1 << (needed - 1).bit_length()))
    return Tile(vectors, threads, width)
