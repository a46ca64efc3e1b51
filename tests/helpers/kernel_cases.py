"""What the kernel tests share: random policy-loss problems, the float64 oracle, and the backends
that can run here.

Shapes: T rows, H hidden, V vocabulary, S sequences, K teacher support.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase
from torch import Tensor

from zppo_kernels import PolicyLossSettings
from zppo_kernels.jsd_reference import teacher_tail
from zppo_kernels.policy_inputs import prepare_rows
from zppo_kernels.policy_reference import (
    PolicyLossOutput,
    log_probs_reference,
    policy_loss_reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
BACKENDS = ["torch", "numba", *(["triton"] if INTERPRETED else [])]
SLOW_BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "triton" else []) for name in BACKENDS
]  # the interpreter takes seconds


# Hypothesis for numerical properties: the same examples in every run, and no shrinking, which takes
# the interpreter minutes.
NUMERIC = {
    "deadline": None,
    "derandomize": True,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


@dataclass(frozen=True)
class Case:
    """One problem: tensors of the LM head, target ids, and the keyword arguments of the loss."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor
    target_ids_T: Tensor
    inputs: dict[str, Any]

    def with_inputs(self, **changes: Any) -> Case:
        """The same problem with other keyword arguments."""
        return replace(self, inputs=self.inputs | changes)

    @property
    def logits_TV(self) -> Tensor:
        """Materialised, in the dtype of the hidden states."""
        return self.hidden_TH @ self.weight_VH.T + self.bias_V

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh copies of hidden, weight and bias that collect gradients."""
        hidden, weight, bias = (
            tensor.detach().to(dtype).clone().requires_grad_()
            for tensor in (self.hidden_TH, self.weight_VH, self.bias_V)
        )
        return hidden, weight, bias


def make_case(
    seed: int = 0,
    *,
    rows: int = 29,
    hidden: int = 12,
    vocabulary: int = 301,
    sequences: int = 5,
    drift: float = 0.4,
) -> Case:
    """A problem with masked rows, an ignored target, a zero advantage and an unusable behaviour
    log-prob."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_TH, weight_VH, bias_V = (
        normal(rows, hidden),
        normal(vocabulary, hidden),
        normal(vocabulary),
    )
    target_ids_T = torch.randint(vocabulary, (rows,), generator=generator)
    sequence_ids_T = torch.randint(sequences, (rows,), generator=generator).sort().values
    advantages_S = normal(sequences)
    mask_T = torch.rand(rows, generator=generator) > 0.2
    log_probs_T, _ = log_probs_reference(hidden_TH @ weight_VH.T + bias_V, target_ids_T)
    proximal_T = log_probs_T + drift * normal(rows)
    behaviour_T = proximal_T + drift * normal(rows)
    if rows > 3:
        target_ids_T[1], behaviour_T[2], advantages_S[0] = -100, float("nan"), 0.0
    inputs = {
        "sequence_ids_T": sequence_ids_T,
        "advantages_S": advantages_S,
        "proximal_log_probs_T": proximal_T,
        "behaviour_log_probs_T": behaviour_T,
        "reference_log_probs_T": proximal_T + drift * normal(rows),
        "mask_T": mask_T,
        "token_count": 2 * rows,
        "sequence_count": 2 * sequences,
    }
    return Case(hidden_TH, weight_VH, bias_V, target_ids_T, inputs)


@dataclass(frozen=True)
class Answer:
    """Loss, metrics, and gradients by hidden states, weight, bias and logits."""

    output: PolicyLossOutput
    gradients: tuple[Tensor, ...]


def head_logits(raw_TV: Tensor, scale: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """What a head with a scale and a soft cap makes of its product."""
    return scale * raw_TV if soft_cap is None else soft_cap * torch.tanh(scale * raw_TV / soft_cap)


def reference_answer(
    case: Case,
    settings: PolicyLossSettings,
    dtype: torch.dtype = torch.float64,
    head: tuple[float, float | None] = (1.0, None),
    hidden_rows_T: Tensor | None = None,
) -> Answer:
    """Autograd through materialised logits, in float64 (the oracle) or in the dtype under test (the
    yardstick). head: its scale and soft cap; the gradient by the logits is by those behind them.
    hidden_rows_T: the hidden state of each row, where they share them."""
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    leaves = case.leaves(dtype)
    hidden_TH = leaves[0] if hidden_rows_T is None else leaves[0][hidden_rows_T]
    logits_TV = head_logits(hidden_TH @ leaves[1].T + leaves[2], *head)
    rows = prepare_rows(case.target_ids_T, like=logits_TV, settings=settings, **inputs)
    output = policy_loss_reference(logits_TV, rows, settings)
    return Answer(output, torch.autograd.grad(output.loss, (*leaves, logits_TV)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.double() - expected.double()).abs().max()) / scale


def top_k_log_probs(
    student_logits_TV: Tensor,
    teacher_ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Student and teacher log-probs [T, K + 1]: the K tokens of the support, and the tail as one
    category.

    The student's tail is summed over the other logits and never formed as 1 - sum, which cancels.
    Ids below 0 are padding.
    """
    scaled_TV = student_logits_TV / temperature
    padding_TK = teacher_ids_TK < 0
    ids_TK = teacher_ids_TK.clamp(min=0)
    total_T1 = torch.logsumexp(scaled_TV, dim=-1, keepdim=True)
    picked_TK = torch.where(padding_TK, -math.inf, scaled_TV.gather(1, ids_TK) - total_T1)
    support_TV = (
        torch.zeros_like(scaled_TV, dtype=torch.int32).scatter_add(1, ids_TK, (~padding_TK).int())
        > 0
    )
    tail_TV = torch.where(support_TV, -math.inf, scaled_TV)
    tail_T1 = torch.logsumexp(tail_TV, dim=-1, keepdim=True) - total_T1
    teacher_TK = torch.where(padding_TK, -math.inf, teacher_log_probs_TK.to(scaled_TV.dtype))
    return torch.cat([picked_TK, tail_T1], 1), torch.cat(
        [teacher_TK, teacher_tail(teacher_TK, tail_T1.detach())], 1
    )
