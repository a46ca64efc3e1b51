"""The LM head on a CPU: bf16 products with float32 results, and no trace left in torch's
settings."""

from __future__ import annotations

import pytest
import torch

from zppo_kernels.projection import Projection, bf16_operands

MATMUL = torch.backends.mkldnn.matmul


def head(dtype: torch.dtype) -> tuple[Projection, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(257, 64, generator=generator).to(dtype)
    hidden_CH = torch.randn(19, 64, generator=generator).to(dtype)
    return Projection.of(weight_VH, None), weight_VH, hidden_CH


def logits(projection: Projection, hidden_CH: torch.Tensor) -> torch.Tensor:
    return projection.logits(projection.operand(hidden_CH), projection.buffer(len(hidden_CH)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_not_rounded_below_float32(dtype: torch.dtype) -> None:
    projection, weight_VH, hidden_CH = head(dtype)
    expected = hidden_CH.double() @ weight_VH.double().T
    found = logits(projection, hidden_CH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    projection, weight_VH, hidden_CH = head(dtype)
    gradient_CV = torch.randn(19, 257, generator=torch.Generator().manual_seed(4))
    total_VH = torch.full((257, 64), torch.nan)
    projection.add_weight_gradient(total_VH, gradient_CV, projection.operand(hidden_CH), True)
    projection.add_weight_gradient(total_VH, gradient_CV, projection.operand(hidden_CH), False)
    error = (
        1e-5 if dtype == torch.float32 else 2**-8
    )  # a GPU rounds the gradient of the logits to bf16 as well
    expected_VH = 2 * gradient_CV.double().T @ hidden_CH.double()
    expected_CH = gradient_CV.double() @ weight_VH.double()
    hidden_gradient_CH = torch.empty_like(hidden_CH, dtype=torch.float32)
    projection.hidden_gradient(gradient_CV, hidden_gradient_CH)
    for found, expected in ((total_VH, expected_VH), (hidden_gradient_CH, expected_CH)):
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) <= error * float(expected.norm())


def test_only_a_bf16_head_may_round_its_operands() -> None:
    assert [
        head(dtype)[0].was_bf16
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    ] == [
        True,
        False,
        False,
        False,
    ]


def test_the_setting_of_torch_is_put_back() -> None:
    before = MATMUL.fp32_precision
    with pytest.raises(ZeroDivisionError), bf16_operands(True):
        assert MATMUL.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert MATMUL.fp32_precision == before
    with bf16_operands(False):
        assert MATMUL.fp32_precision == before
    logits(head(torch.bfloat16)[0], head(torch.bfloat16)[2])
    assert MATMUL.fp32_precision == before
