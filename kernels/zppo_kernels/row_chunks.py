"""Materialised logits in pieces: all rows at once where the backend reads their dtype, widened
chunks elsewhere.

Invariant: a chunk's gradient ends up in its rows of `gradient_TV`, which may be the logits
themselves.

Shapes: T rows, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .projection import chunk_rows

_HALF = (torch.bfloat16, torch.float16)


def accumulator_of(logits_TV: Tensor) -> torch.dtype:
    """The dtype of losses and row statistics."""
    return torch.float64 if logits_TV.dtype == torch.float64 else torch.float32


def _is_native(logits_TV: Tensor) -> bool:
    """Whether the backend reads and writes half precision itself."""
    return backend_for(logits_TV).name == "triton" or logits_TV.dtype not in _HALF


def row_chunks(logits_TV: Tensor) -> list[slice]:
    """All rows at once where one launch does it; chunks near the cache on a CPU."""
    rows, vocabulary = logits_TV.shape
    if rows == 0:
        return []
    size = (
        rows
        if backend_for(logits_TV).name == "triton"
        else chunk_rows(rows, vocabulary, logits_TV.device)
    )
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def widened(logits_CV: Tensor) -> Tensor:
    """Logits as the backend reads them: half precision is widened in a copy where it must be."""
    return logits_CV.detach() if _is_native(logits_CV) else logits_CV.detach().float()


def destination_of(logits_CV: Tensor, gradient_TV: Tensor | None, part: slice) -> Tensor | None:
    """Where the chunk's gradient is computed: its place in the result, or the widened copy."""
    if gradient_TV is None or not _is_native(gradient_TV):
        return None if gradient_TV is None else logits_CV
    return gradient_TV[part]


def deliver(gradient_CV: Tensor | None, gradient_TV: Tensor | None, part: slice) -> None:
    """Round the widened copy into the result, where there was one."""
    if gradient_CV is not None and gradient_TV is not None and not _is_native(gradient_TV):
        gradient_TV[part] = gradient_CV
