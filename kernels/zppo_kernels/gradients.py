"""Autograd of losses whose gradients are complete when the forward pass ends: backward only scales
them.

Invariant: the kept gradients are changed only when their graph is not kept, so a second backward
pass over a retained graph is right as well; a second *derivative* would silently be 0 and is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**22  # entries of a gradient that a CPU rounds at one time


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Custom operators return tensors only: an empty one stands for "not needed"."""
    return like.new_empty(0) if gradient is None else gradient


def keep_linear_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For operators of (hidden, weight, bias, ..., needs x 3) -> (loss, ..., gradients x 3)."""
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.needs = inputs[-3:]
    ctx.weight = inputs[1]
    ctx.save_for_backward(*output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def linear_backward(name: str, constants: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of such an operator, whose other `constants` arguments have no gradient."""

    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(name)
        results: list[Tensor | None] = [None] * (3 + constants)
        if outer[0] is None:
            return tuple(results)
        for index, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if not ctx.needs[index]:
                continue
            if index == 1 and _added_to_main(name, ctx.weight, gradient, outer[0]):
                continue
            results[index] = scaled(gradient, outer[0], dtype)
        return tuple(results)

    return backward


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once to this dtype and without another copy of it: over its own
    memory where the graph is not kept, else into the result, some rows at a time."""
    if gradient.dtype == dtype and not _graph_is_kept():
        return gradient.mul_(factor)
    result = torch.empty_like(gradient, dtype=dtype)
    # A CPU widens what it writes into a narrower dtype: as much as one piece at a time.
    size = len(gradient) if gradient.is_cuda else _PIECE // max(1, gradient[:1].numel())
    size = max(1, size)
    for start in range(0, len(gradient), size):
        part = slice(start, start + size)
        torch.mul(gradient[part], factor, out=result[part])
    return result


def _graph_is_kept() -> bool:
    """Whether a second backward pass may come over the same graph; always, while it is traced."""
    if torch.compiler.is_compiling():
        return True
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def _added_to_main(name: str, weight: Tensor, gradient: Tensor, factor: Tensor) -> bool:
    """Add the weight's gradient to its float32 `main_grad`, where it has one, as Megatron names it.

    Over many micro-batches a bf16 `.grad` is rounded at each; this sum never is.
    """
    main = getattr(weight, "main_grad", None)
    if main is None:
        return False
    if main.shape != weight.shape or main.dtype != gradient.dtype:
        raise ValueError(
            f"{name}: main_grad of the weight is {main.dtype} {list(main.shape)}; expected "
            f"{gradient.dtype} {list(weight.shape)}"
        )
    main.addcmul_(gradient, factor)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
    return True


def keep_logits_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For operators of (logits, ...) -> (loss, ..., gradient)."""
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def logits_backward(name: str, constants: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of such an operator, whose other `constants` arguments have no gradient."""

    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(name)
        (gradient,) = ctx.saved_tensors
        result = None if outer[0] is None else scaled(gradient, outer[0], gradient.dtype)
        return (result, *([None] * constants))

    return backward


def refuse_double_backward(name: str) -> None:
    """Raise where autograd was asked to build a graph of the backward pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: call backward without create_graph=True"
        )
