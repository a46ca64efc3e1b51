"""Which code runs the row operations: Triton on a GPU, numba on a CPU, plain torch for what neither
takes.

`using_backend` overrides the choice; the tests run the Triton kernels on CPU tensors with it, under
Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ._numba import HAVE_NUMBA
from .rows_torch import TorchRows

BackendName = Literal["torch", "numba", "triton"]
_forced: list[BackendName] = []


@contextmanager
def using_backend(name: BackendName) -> Iterator[None]:
    """Run everything inside on one backend, whatever the device; float64 stays with torch, which
    alone has it."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def backend_for(tensor: Tensor) -> TorchRows:
    """The fastest backend that takes this tensor's device and dtype."""
    if tensor.dtype == torch.float64:
        return _backend("torch")
    if _forced:
        return _backend(_forced[-1])
    if tensor.is_cuda:
        return _backend("triton" if find_spec("triton") else "torch")
    return _backend("numba" if HAVE_NUMBA and tensor.device.type == "cpu" else "torch")


@cache
def _backend(name: BackendName) -> TorchRows:
    # Imported on first use: neither numba nor Triton is needed to import the package.
    if name == "triton":
        from .rows_triton import TritonRows

        return TritonRows()
    if name == "numba":
        from .rows_numba import NumbaRows

        return NumbaRows()
    return TorchRows()
