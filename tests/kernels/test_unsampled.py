"""Tokens that no response may hold are taken out of a softmax by a bias of -inf: losses and
gradients are then those of a vocabulary without them, and what they get is exactly nothing.

Shapes: T rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import SLOW_BACKENDS
from torch import Tensor

from zppo_kernels import (
    PolicyLossSettings,
    jsd_loss_from_hidden,
    policy_loss_from_hidden,
    token_log_probs,
)
from zppo_kernels.backends import using_backend

T, H, V = 7, 16, 64
LEFT_OUT = [3, 5, 63]
KEPT = [index for index in range(V) if index not in LEFT_OUT]
TARGETS = torch.tensor([0, 1, 2, 4, 10, 20, 62])
Found = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def problem(dtype: torch.dtype, temperature: float, *, smaller: bool) -> Found:
    """Everything the trainer computes of a head, over a vocabulary that lacks the tokens, or with a
    bias that leaves them out. One of them would be by far the most probable."""
    numbers = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=numbers, dtype=torch.float64)
    weight = torch.randn(V, H, generator=numbers, dtype=torch.float64)
    weight[5] *= 10
    targets, bias = TARGETS, None
    if smaller:
        weight, targets = weight[KEPT], torch.tensor([KEPT.index(int(one)) for one in TARGETS])
    else:
        bias = torch.zeros(V, dtype=dtype)
        bias[LEFT_OUT] = -torch.inf
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    log_probs, entropy = token_log_probs(
        hidden, weight, targets, bias_V=bias, temperature=temperature
    )
    found = {"log_probs": log_probs, "entropy": entropy}
    old = log_probs - 0.1
    settings = PolicyLossSettings(temperature=temperature, entropy_coefficient=0.1)
    policy = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = policy_loss_from_hidden(
        *policy, targets, bias_V=bias, sequence_ids_T=torch.zeros(T, dtype=torch.int64),
        advantages_S=torch.ones(1), proximal_log_probs_T=old, behaviour_log_probs_T=old,
        token_count=T, sequence_count=1, settings=settings,
    ).loss  # fmt: skip
    student = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    divergence = jsd_loss_from_hidden(
        *student, 1.1 * hidden, 0.7 * weight + 0.1, student_bias_V=bias, teacher_bias_W=bias,
        beta=0.5, temperature=temperature, token_count=T,
    ).loss  # fmt: skip
    for name, value, leaves in (("policy", loss, policy), ("jsd", divergence, student)):
        value.backward()
        gradients: list[Any] = [leaf.grad for leaf in leaves]
        found |= {name: value.detach(), f"{name} hidden": gradients[0]}
        found[f"{name} weight"] = gradients[1] if smaller else gradients[1][KEPT]
        if not smaller:
            found[f"{name} left out"] = gradients[1][LEFT_OUT]
    return found


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_bias_of_minus_infinity_is_a_smaller_vocabulary(backend: str, temperature: float) -> None:
    expected = problem(torch.float64, temperature, smaller=True)
    with using_backend(backend):
        found = problem(torch.float32, temperature, smaller=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=5e-6)
    for name in ("policy left out", "jsd left out"):
        assert not found[name].any()
