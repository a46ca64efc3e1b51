"""The chunk loop of every loss from hidden states: logits, row gradient, and at once its two
products.

Invariant: no more than one chunk of logits exists at any time, and gradient buffers exist only for
what needs a
    gradient.

Shapes: L rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import result_like
from .projection import Projection, chunk_rows


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether the rows' gradient is needed at all."""
        return self.hidden or self.weight or self.bias


@dataclass
class LinearGradients:
    """Gradients in the accumulator's dtype; None where not needed."""

    hidden_LH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None
    chunks: int = 0

    @staticmethod
    def empty(head: Projection, rows: int, needs: Needs) -> LinearGradients:
        """Uninitialised; with no rows at all, zero."""
        vocabulary, width = head.weight_VH.shape
        new = torch.empty if rows else torch.zeros
        device, dtype = head.weight_VH.device, head.accumulator
        return LinearGradients(
            hidden_LH=new(rows, width, dtype=dtype, device=device) if needs.hidden else None,
            weight_VH=new(vocabulary, width, dtype=dtype, device=device) if needs.weight else None,
            bias_V=torch.zeros(vocabulary, dtype=dtype, device=device) if needs.bias else None,
        )

    def add(self, head: Projection, hidden_CH: Tensor, gradient_CV: Tensor, part: slice) -> None:
        """The two products of one chunk."""
        if self.hidden_LH is not None:
            head.hidden_gradient(gradient_CV, self.hidden_LH[part])
        if self.weight_VH is not None:
            head.add_weight_gradient(self.weight_VH, gradient_CV, hidden_CH, self.chunks == 0)
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(0, dtype=self.bias_V.dtype)
        self.chunks += 1


def logit_chunks(
    head: Projection, hidden_LH: Tensor, rows_per_chunk: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: its slice of the rows, its hidden states, its logits (in one buffer, used
    again by the next)."""
    rows = len(hidden_LH)
    if rows == 0:
        return
    size = rows_per_chunk or chunk_rows(rows, head.weight_VH.shape[0], hidden_LH.device)
    buffer_CV = head.buffer(size)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        hidden_CH = head.operand(hidden_LH[part])
        yield part, hidden_CH, head.logits(hidden_CH, buffer_CV)


def linear_gradients(
    head: Projection,
    hidden_LH: Tensor,
    needs: Needs,
    row_gradient: Callable[[slice, Tensor, Tensor | None], None],
) -> LinearGradients:
    """Run `row_gradient(rows, logits, where the gradient goes or None)` over all chunks and collect
    the products."""
    gradients = LinearGradients.empty(head, len(hidden_LH), needs)
    for part, hidden_CH, logits_CV in logit_chunks(head, hidden_LH):
        gradient_CV = head.gradient_view(logits_CV) if needs.any else None
        row_gradient(part, logits_CV, gradient_CV)
        if gradient_CV is not None:
            gradients.add(head, hidden_CH, gradient_CV, part)
    return gradients


def spread(gradient_LH: Tensor | None, live_L: Tensor, hidden_TH: Tensor) -> Tensor:
    """Gradient of the live rows among the zeros of all rows."""
    if gradient_LH is None:
        return hidden_TH.new_empty(0)
    if len(live_L) == len(hidden_TH):
        return gradient_LH
    return result_like(hidden_TH, gradient_LH.dtype).zero_().index_copy_(0, live_L, gradient_LH)
