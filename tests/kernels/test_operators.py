"""The losses as operators: torch.compile without a graph break, fake implementations that tell the
truth, no autograd surprises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import make_case, relative_error

from zppo_kernels import (
    PolicyLossSettings,
    group_advantages,
    jsd_loss_from_hidden,
    jsd_loss_from_logits,
    jsd_loss_top_k_from_hidden,
    jsd_loss_top_k_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)

CASE = make_case(1)
SUPPORT = torch.randn(29, 301, generator=torch.Generator().manual_seed(0)).log_softmax(-1).topk(4)
TEACHER = torch.randn(29, 301, generator=torch.Generator().manual_seed(1))


def hidden_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return policy_loss_from_hidden(
        hidden, weight, CASE.target_ids_T, bias_V=bias, **CASE.inputs
    ).loss


def sequence_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    settings = PolicyLossSettings(ratio_level="sequence", normalisation="sequence")
    return policy_loss_from_hidden(
        hidden, weight, CASE.target_ids_T, bias_V=bias, settings=settings, **CASE.inputs
    ).loss


def logits_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return policy_loss_from_logits(hidden @ weight.T + bias, CASE.target_ids_T, **CASE.inputs).loss


def distillation_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    dense = jsd_loss_from_hidden(
        hidden, weight, CASE.hidden_TH, CASE.weight_VH + 0.1, student_bias_V=bias, token_count=29
    )
    sparse = jsd_loss_top_k_from_hidden(
        hidden, weight, SUPPORT.indices, SUPPORT.values, token_count=29
    )
    logits_TV = hidden @ weight.T
    others = jsd_loss_from_logits(logits_TV, TEACHER, token_count=29).loss
    return dense.loss + sparse.loss + others


def with_constants(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    log_probs_T, entropy_T = token_log_probs(hidden, weight, CASE.target_ids_T, bias_V=bias)
    other_T, _ = token_log_probs_from_logits(hidden @ weight.T, CASE.target_ids_T)
    advantages_R = group_advantages(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
    return (hidden.sum(1) * (log_probs_T + entropy_T + other_T)).sum() * advantages_R[0]


LOSSES: list[Callable[..., torch.Tensor]] = [
    hidden_loss,
    sequence_loss,
    logits_loss,
    distillation_loss,
    with_constants,
]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break(loss: Callable[..., torch.Tensor]) -> None:
    eager, traced = CASE.leaves(torch.float32), CASE.leaves(torch.float32)
    expected = loss(*eager)
    expected.backward()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(traced, eager, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert relative_error(one.grad, other.grad) < 1e-6


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that is called from now on, with its arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    original = torch.library.CustomOpDef.__call__

    def record(self: Any, *arguments: Any) -> Any:
        calls.append((self, arguments))
        return original(self, *arguments)

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", record)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES[:4])
def test_fake_implementations_tell_shapes_dtypes_and_strides(
    loss: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`opcheck` on the very arguments that the public functions give their operators."""
    calls = recorded(monkeypatch)
    loss(*CASE.leaves(torch.float32))
    monkeypatch.undo()
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(
            operator._opoverload, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.slow
def test_fake_implementations_tell_the_strides_of_strided_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled code believes the fake: a transposed head must give what it says."""
    calls = recorded(monkeypatch)
    hidden, weight, bias = CASE.leaves(torch.float32)
    turned = hidden.T.contiguous().T, weight.T.contiguous().T
    logits_TV = (weight @ hidden.T).T
    for loss in LOSSES[:4]:
        loss(*turned, bias)
    policy_loss_from_logits(logits_TV, CASE.target_ids_T, **CASE.inputs)
    jsd_loss_from_logits(logits_TV, TEACHER.T.contiguous().T, token_count=29)
    jsd_loss_top_k_from_logits(logits_TV, *SUPPORT[::-1], token_count=29)
    monkeypatch.undo()
    for operator, arguments in calls:
        torch.library.opcheck(
            operator._opoverload, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_gradients_come_only_to_those_who_want_them() -> None:
    hidden, weight, bias = CASE.leaves(torch.float32)
    weight.requires_grad_(False)
    hidden_loss(hidden, weight, bias).backward()
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None


def test_metrics_carry_no_gradient() -> None:
    leaves = CASE.leaves(torch.float32)
    output = policy_loss_from_hidden(leaves[0], leaves[1], CASE.target_ids_T, **CASE.inputs)
    assert not any(value.requires_grad for value in output.metrics.values())
    assert all(
        value.dtype == torch.float64 and value.dim() == 0 for value in output.metrics.values()
    )


def test_counts_may_be_tensors() -> None:
    """A global count that an all-reduce left on the device is never read by the host."""
    leaves = CASE.leaves(torch.float32)
    number = policy_loss_from_hidden(leaves[0], leaves[1], CASE.target_ids_T, **CASE.inputs)
    tensor = policy_loss_from_hidden(
        leaves[0], leaves[1], CASE.target_ids_T, **(CASE.inputs | {"token_count": torch.tensor(58)})
    )
    assert number.loss.item() == tensor.loss.item()


@pytest.mark.parametrize(
    "name",
    [
        "jsd_loss_from_hidden",
        "jsd_loss_top_k_from_hidden",
        "jsd_loss_from_logits",
        "jsd_loss_top_k_from_logits",
    ],
)
def test_second_derivatives_of_the_divergences_are_refused(name: str) -> None:
    hidden, weight, _ = CASE.leaves(torch.float32)
    logits_TV = (CASE.hidden_TH @ CASE.weight_VH.T).requires_grad_()
    loss = {
        "jsd_loss_from_hidden": lambda: jsd_loss_from_hidden(
            hidden, weight, CASE.hidden_TH, CASE.weight_VH, token_count=1
        ),
        "jsd_loss_top_k_from_hidden": lambda: jsd_loss_top_k_from_hidden(
            hidden, weight, *_support(), token_count=1
        ),
        "jsd_loss_from_logits": lambda: jsd_loss_from_logits(logits_TV, TEACHER, token_count=1),
        "jsd_loss_top_k_from_logits": lambda: jsd_loss_top_k_from_logits(
            logits_TV, *_support(), token_count=1
        ),
    }[name]().loss
    with pytest.raises(RuntimeError, match=f"^{name} has no second derivative"):
        torch.autograd.grad(loss, hidden if "hidden" in name else logits_TV, create_graph=True)


def _support() -> tuple[torch.Tensor, torch.Tensor]:
    return SUPPORT.indices, SUPPORT.values
