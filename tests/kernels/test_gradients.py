"""Where the gradients of a head go: scaled once, rounded once, and into a float32 sum over
micro-batches where the weight has one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernel_cases import make_case, reference_answer, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zppo_kernels import PolicyLossSettings, jsd_loss_from_hidden, policy_loss_from_hidden

DEFAULT = PolicyLossSettings()
CASE = make_case(30, rows=24, hidden=12, vocabulary=40)


def head() -> tuple[Tensor, Tensor]:
    """Hidden states and a bf16 weight as a leaf."""
    hidden_TH, weight_VH, _ = CASE.leaves(torch.bfloat16)
    return hidden_TH.detach(), weight_VH


def test_main_grad_is_not_rounded_at_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights, 40 micro-batches of one step, against the sum in float64. Products in float32:
    a CPU may round their operands."""
    monkeypatch.setattr("zppo_kernels.projection.bf16_operands", lambda _: nullcontext())
    hidden_TH, weight_VH = head()
    _, plain_VH = head()
    weight_VH.main_grad = torch.zeros(weight_VH.shape)
    weight_VH.grad_added_to_main_grad = False
    for batch in range(40):
        factor = 1.0 + 0.37 * batch
        for leaf_VH in (weight_VH, plain_VH):
            loss = policy_loss_from_hidden(
                hidden_TH, leaf_VH, CASE.target_ids_T, bias_V=CASE.bias_V, **CASE.inputs
            ).loss
            (loss * factor).backward()
    case = type(CASE)(
        hidden_TH.double(), weight_VH.detach().double(), CASE.bias_V.double(), CASE.target_ids_T,
        CASE.inputs,
    )  # fmt: skip
    exact_VH = reference_answer(case, DEFAULT).gradients[1]
    total_VH = exact_VH * sum(1.0 + 0.37 * batch for batch in range(40))
    assert weight_VH.grad is None and weight_VH.grad_added_to_main_grad
    assert plain_VH.grad is not None and plain_VH.grad.dtype == torch.bfloat16
    assert relative_error(weight_VH.main_grad, total_VH) < 1e-5
    assert relative_error(plain_VH.grad, total_VH) > 1e-3


def test_main_grad_of_a_distillation() -> None:
    hidden_TH, weight_VH = head()
    (expected_VH,) = torch.autograd.grad(
        jsd_loss_from_hidden(
            hidden_TH, weight_VH, CASE.hidden_TH, CASE.weight_VH, token_count=24
        ).loss,
        weight_VH,
    )
    weight_VH.main_grad = torch.zeros(weight_VH.shape)
    jsd_loss_from_hidden(
        hidden_TH, weight_VH, CASE.hidden_TH, CASE.weight_VH, token_count=24
    ).loss.backward()
    assert weight_VH.grad is None
    assert torch.equal(weight_VH.main_grad.bfloat16(), expected_VH)


def test_main_grad_of_another_shape_or_dtype_is_refused() -> None:
    hidden_TH, weight_VH = head()
    weight_VH.main_grad = torch.zeros(40, 12, dtype=torch.bfloat16)
    loss = policy_loss_from_hidden(hidden_TH, weight_VH, CASE.target_ids_T, **CASE.inputs).loss
    sentence = (
        "policy_loss_from_hidden: main_grad of the weight is torch.bfloat16 [40, 12]; expected "
        "torch.float32 [40, 12]"
    )
    with pytest.raises(ValueError) as found:
        loss.backward()
    assert str(found.value) == sentence


class Made(TorchDispatchMode):
    """New tensors of as many entries as the weight, by operator."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.names = entries, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        is_large = isinstance(result, Tensor) and result.numel() == self.entries
        if is_large and result.data_ptr() not in given:
            self.names.append((func.name(), result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_makes_no_second_float32_gradient(dtype: torch.dtype) -> None:
    """Scaled in its own memory where the graph is not kept, or rounded once on the way out."""
    hidden_TH, weight_VH, _ = CASE.leaves(dtype)
    hidden_TH = hidden_TH.detach()

    def loss() -> Tensor:
        return (
            3.0
            * policy_loss_from_hidden(hidden_TH, weight_VH, CASE.target_ids_T, **CASE.inputs).loss
        )

    once = loss()
    with Made(weight_VH.numel()) as made:
        torch.autograd.grad(once, weight_VH)
    assert all(kind == torch.bfloat16 for _, kind in made.names), made.names
    twice = loss()
    first = torch.autograd.grad(twice, weight_VH, retain_graph=True)[0].clone()
    second = torch.autograd.grad(twice, weight_VH, retain_graph=True)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(twice, weight_VH)[0])
