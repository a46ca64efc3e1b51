"""How arguments and results lie in memory, and in which dtypes: decided here, for every loss and
every backend.

- One value per row, sequence or rollout: contiguous and detached; a strided or expanded vector is
  copied.
- A matrix of logits: unit columns, rows any distance apart. One with other columns is copied, some
  rows at a time.
- Hidden states and LM heads: any layout, since they only meet matrix products.
- A result is contiguous, whatever the layout of the argument that it belongs to.
- Only rows of their own with unit columns are overwritten in place; anything else is refused in
  words.

Invariant: kernels get pointers and row strides, never strides of columns; `trusted` is the last
look before a launch.

Shapes: T rows, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def accumulator_of(like: Tensor) -> torch.dtype:
    """The dtype of losses, row statistics and sums: float32; float64 where all is, as in the oracle
    of the tests."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def column(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One value per row (or sequence, or rollout): a constant of the loss, contiguous, in this
    dtype."""
    return values.detach().to(dtype).contiguous()


def has_unit_columns(matrix_TV: Tensor) -> bool:
    """Whether the entries of a row lie side by side."""
    return matrix_TV.stride(1) == 1 or matrix_TV.shape[1] == 1


def unit_columns(matrix_TV: Tensor) -> Tensor:
    """The matrix itself, or a contiguous copy."""
    return matrix_TV if has_unit_columns(matrix_TV) else matrix_TV.contiguous()


def result_like(matrix_TV: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous; `torch.empty_like` alone would keep the strides of a transposed
    matrix."""
    return torch.empty_like(matrix_TV, dtype=dtype, memory_format=torch.contiguous_format)


def check_in_place(name: str, matrix_TV: Tensor) -> None:
    """Raise ValueError where a gradient written over this matrix would hit memory twice, or a
    leaf's own values."""
    if matrix_TV.is_leaf and matrix_TV.requires_grad:
        raise ValueError(
            f"in_place=True, but {name} is a leaf that requires grad; use in_place=False"
        )
    rows, columns = matrix_TV.shape
    if not has_unit_columns(matrix_TV) or (rows > 1 and matrix_TV.stride(0) < columns):
        raise ValueError(
            f"in_place=True, but {name} has strides {matrix_TV.stride()}; expected rows of its own "
            "with unit columns: "
            "call .contiguous() first, or use in_place=False"
        )


def trusted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a launch is given, unchanged: vectors without gaps, matrices with unit columns."""
    for tensor in tensors:
        assert has_unit_columns(tensor) if tensor.dim() == 2 else tensor.is_contiguous(), (
            tensor.stride()
        )
    return tensors
