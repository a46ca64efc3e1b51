"""Materialised logits in pieces: all rows at once where the backend reads them as they are, chunks
elsewhere.

Invariant: a chunk's gradient ends up in its rows of `gradient_TV`, which may be the logits
themselves.

Shapes: T rows, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from .backends import backend_for
from .layout import HALF, has_unit_columns, unit_columns
from .projection import chunk_rows


def _is_native(logits_TV: Tensor) -> bool:
    """Whether the backend reads and writes half precision itself."""
    return backend_for(logits_TV).name == "triton" or logits_TV.dtype not in HALF


def row_chunks(logits_TV: Tensor, *others: Tensor) -> list[slice]:
    """All rows at once where one launch does it; small chunks on a CPU, and wherever a chunk has to
    be copied."""
    rows, vocabulary = logits_TV.shape
    if rows == 0:
        return []
    at_once = backend_for(logits_TV).name == "triton" and all(
        map(has_unit_columns, (logits_TV, *others))
    )
    size = rows if at_once else chunk_rows(rows, vocabulary, logits_TV.device)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def readable(logits_CV: Tensor) -> Tensor:
    """Logits as the backend reads them: copied where columns are apart or half precision must be
    widened."""
    logits_CV = unit_columns(logits_CV.detach())
    return logits_CV if _is_native(logits_CV) else logits_CV.float()


def destination_of(logits_CV: Tensor, gradient_TV: Tensor | None, part: slice) -> Tensor | None:
    """Where the chunk's gradient is computed: its place in the result, or the widened copy."""
    if gradient_TV is None or not _is_native(gradient_TV):
        return None if gradient_TV is None else logits_CV
    return gradient_TV[part]


def deliver(gradient_CV: Tensor | None, gradient_TV: Tensor | None, part: slice) -> None:
    """Round the widened copy into the result, where there was one."""
    if gradient_CV is not None and gradient_TV is not None and not _is_native(gradient_TV):
        gradient_TV[part] = gradient_CV
