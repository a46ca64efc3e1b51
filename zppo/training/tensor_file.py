"""A safetensors file that is written one tensor after the other and read row by row, so that
neither needs more of it in memory than one tensor.

safetensors' own writer takes all tensors at once. The format is a header of eight bytes (its
length) and JSON, then the tensors' bytes end to end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES = {code: dtype for dtype, code in CODES.items()}
ALIGNMENT = 8


class Kind(NamedTuple):
    """What a tensor is but for its values; of a sharded one, as a whole."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def kind_of(tensor: Tensor) -> Kind:
    return Kind(tensor.dtype, tuple(tensor.shape))


class SavedTensors(Protocol):
    """Tensors by name, wherever they lie."""

    def kinds(self) -> Mapping[str, Kind]: ...

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """`count` rows of a tensor from row `start` on; a scalar is its own only row."""


class TensorFile:
    """The `SavedTensors` of an open file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def kinds(self) -> dict[str, Kind]:
        return {name: self._kind(name) for name in self._file.keys()}  # noqa: SIM118 - no mapping

    def rows(self, name: str, start: int, count: int) -> Tensor:
        part = self._file.get_slice(name)
        scalar = not part.get_shape()
        found: Tensor = self._file.get_tensor(name) if scalar else part[start : start + count]
        return found

    def _kind(self, name: str) -> Kind:
        part = self._file.get_slice(name)
        code = part.get_dtype()
        return Kind(DTYPES.get(code, code), tuple(part.get_shape()))


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """The tensors of a file. Raises SafetensorError if it is none, OSError if it cannot be read."""
    with safe_open(path, framework="pt") as file:
        yield TensorFile(file)


def write(path: Path, kinds: Mapping[str, Kind], tensors: Iterable[Tensor]) -> None:
    """Write a file of these tensors, which come in the order of `kinds`, and sync it."""
    header, end = dict[str, Any](), 0
    for name, kind in kinds.items():
        assert isinstance(kind.dtype, torch.dtype)
        start, end = end, end + prod(kind.shape) * kind.dtype.itemsize
        header[name] = {
            "dtype": CODES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, end],
        }
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, kind), tensor in zip(kinds.items(), tensors, strict=True):
            assert kind_of(tensor) == kind, name
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data if len(flat) else b"")
        file.flush()
        os.fsync(file.fileno())
