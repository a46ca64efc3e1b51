"""The compiled kernels on a GPU, in bf16, where the interpreter cannot go.

Run: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import Case, make_case, reference_answer, relative_error

from zppo_kernels import (
    PolicyLossSettings,
    group_advantages,
    jsd_loss_from_hidden,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs_from_logits,
)
from zppo_kernels.advantages import group_advantages_reference
from zppo_kernels.backends import backend_for, using_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: set TRITON_INTERPRET=0"
    ),
]


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    """Everything on the GPU, the LM head in `dtype`."""
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in case.inputs.items()
    }
    hidden, weight, bias = (
        tensor.cuda().to(dtype) for tensor in (case.hidden_TH, case.weight_VH, case.bias_V)
    )
    return Case(hidden, weight, bias, case.target_ids_T.cuda(), inputs)


@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_policy_loss_from_hidden(dtype: torch.dtype, level: str, vocabulary: int) -> None:
    case = on_gpu(make_case(1, rows=70, hidden=64, vocabulary=vocabulary), dtype)
    chosen = PolicyLossSettings(ratio_level=level, kl_coefficient=0.1)
    exact = reference_answer(case, chosen)
    leaves = case.leaves(dtype)
    assert backend_for(leaves[0]).name == "triton"
    output = policy_loss_from_hidden(
        leaves[0],
        leaves[1],
        case.target_ids_T,
        bias_V=leaves[2],
        settings=chosen,
        full_metrics=True,
        **case.inputs,
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(exact.output.loss.item(), rel=1e-4)
    for leaf, gradient in zip(leaves, exact.gradients, strict=False):
        assert leaf.grad is not None
        assert relative_error(leaf.grad, gradient) < {torch.float32: 2e-3}.get(dtype, 2e-2)
    for name, value in exact.output.metrics.items():
        assert float(output.metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("in_place", [False, True])
def test_policy_loss_from_bf16_logits(in_place: bool) -> None:
    case = on_gpu(make_case(2, rows=300, hidden=16, vocabulary=151_936), torch.float32)
    leaf_TV = case.logits_TV.bfloat16().requires_grad_()
    plain_TV = leaf_TV.detach().float().requires_grad_()
    found = policy_loss_from_logits(
        leaf_TV * 1.0, case.target_ids_T, in_place=in_place, **case.inputs
    )
    found.loss.mul(2.0).backward()
    with using_backend("torch"):
        exact = policy_loss_from_logits(plain_TV, case.target_ids_T, **case.inputs)
        exact.loss.mul(2.0).backward()
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)
    assert leaf_TV.grad is not None and plain_TV.grad is not None
    assert relative_error(leaf_TV.grad, plain_TV.grad) < 2**-7


def test_rows_beyond_two_to_the_31_elements() -> None:
    logits_TV = torch.zeros(14_200, 151_936, dtype=torch.bfloat16, device="cuda")
    logits_TV[-1, 7] = 20.0
    target_ids_T = torch.full((14_200,), 7, device="cuda")
    log_probs_T, _ = token_log_probs_from_logits(logits_TV, target_ids_T)
    assert float(log_probs_T[-1]) == pytest.approx(
        float(torch.log_softmax(logits_TV[-1].double(), -1)[7]), abs=1e-5
    )


@pytest.mark.parametrize("mode", ["norm_without_zero", "norm_with_zero", "center_only", "grpo"])
def test_group_advantages(mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rewards_R = (torch.rand(4608, generator=generator) > 0.7).float()
    ids_R = torch.randint(576, (4608,), generator=generator)
    found_R = group_advantages(rewards_R.cuda(), ids_R.cuda(), mode=mode)
    exact_R = group_advantages_reference(rewards_R.double(), ids_R, mode=mode)
    assert torch.allclose(found_R.cpu().double(), exact_R, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_jsd_from_hidden(beta: float) -> None:
    case = on_gpu(make_case(4, rows=40, hidden=64, vocabulary=50_257), torch.bfloat16)
    teacher = (torch.randn_like(case.hidden_TH), torch.randn_like(case.weight_VH))
    leaves = case.leaves(torch.bfloat16)
    found = jsd_loss_from_hidden(leaves[0], leaves[1], *teacher, token_count=40, beta=beta)
    found.loss.backward()
    doubles = case.leaves(torch.float64)
    wide = [tensor.double() for tensor in teacher]
    exact = jsd_loss_from_hidden(doubles[0], doubles[1], *wide, token_count=40, beta=beta)
    exact.loss.backward()
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-3)
    for leaf, double in zip(leaves[:2], doubles[:2], strict=True):
        assert leaf.grad is not None and double.grad is not None
        assert relative_error(leaf.grad, double.grad) < 2e-2
