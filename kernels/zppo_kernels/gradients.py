"""Autograd of losses whose gradients are complete when the forward pass ends: backward only scales
them.

Invariant: the kept gradients are never changed, so a second backward pass over a retained graph is
right as well; a second *derivative* would silently be 0 and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Custom operators return tensors only: an empty one stands for "not needed"."""
    return like.new_empty(0) if gradient is None else gradient


def keep_linear_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For operators of (hidden, weight, bias, ..., needs x 3) -> (loss, ..., gradients x 3)."""
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(*output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def linear_backward(name: str, constants: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of such an operator, whose other `constants` arguments have no gradient."""

    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(name)
        results: list[Tensor | None] = []
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True):
            results.append(
                (gradient * outer[0]).to(dtype) if needed and outer[0] is not None else None
            )
        return (*results, *([None] * constants))

    return backward


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
        scaled = None if outer[0] is None else (gradient * outer[0]).to(gradient.dtype)
        return (scaled, *([None] * constants))

    return backward


def refuse_double_backward(name: str) -> None:
    """Raise where autograd was asked to build a graph of the backward pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: call backward without create_graph=True"
        )
