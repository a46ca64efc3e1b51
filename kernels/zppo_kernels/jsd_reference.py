"""Generalised Jensen-Shannon divergence between teacher and student in plain torch, gradients by
autograd.

Convention of Liger and TRL: beta = 0 is the forward KL(teacher || student), beta = 1 the reverse
KL(student || teacher), between them beta * KL(T || M) + (1 - beta) * KL(S || M) with M = beta * T +
(1 - beta) * S.

Shapes: T rows, V student vocabulary, W teacher vocabulary, K teacher support, C categories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JsdLossOutput:
    """loss: 0-dim, with gradient to the student. metrics: JSD_METRICS (sums and counts, float64,
    without gradient)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def jsd_of_log_probs(student_TC: Tensor, teacher_TC: Tensor, beta: float) -> Tensor:
    """Divergence [T] in nats of two rows of log-probs; categories that both give probability 0
    count 0."""
    if beta == 0.0:
        return _kl(teacher_TC, student_TC)
    if beta == 1.0:
        return _kl(student_TC, teacher_TC)
    mixture_TC = torch.logaddexp(teacher_TC + math.log(beta), student_TC + math.log1p(-beta))
    return beta * _kl(teacher_TC, mixture_TC) + (1.0 - beta) * _kl(student_TC, mixture_TC)


def _kl(first_TC: Tensor, second_TC: Tensor) -> Tensor:
    # 0 * log(0 / x) is 0: selected before the subtraction, so that neither value nor gradient meets
    # inf - inf.
    present_TC = ~torch.isneginf(first_TC)
    first_TC = torch.where(present_TC, first_TC, 0.0)
    second_TC = torch.where(present_TC, second_TC, 0.0)
    return torch.where(present_TC, first_TC.exp() * (first_TC - second_TC), 0.0).sum(-1)


def teacher_over(vocabulary: int, teacher_logits_TW: Tensor, temperature: float) -> Tensor:
    """Teacher log-probs [T, V] over the student's vocabulary.

    Columns only the teacher has are cut off and the rest renormalised; columns only the student has
    get probability 0 (padding a logit with 0 instead would give mass to tokens that do not exist).
    """
    shared = min(vocabulary, teacher_logits_TW.shape[1])
    log_probs_TV = torch.log_softmax(teacher_logits_TW[:, :shared] / temperature, dim=-1)
    return torch.nn.functional.pad(log_probs_TV, (0, vocabulary - shared), value=-math.inf)


def teacher_tail(teacher_TK: Tensor, student_tail_T1: Tensor) -> Tensor:
    """log(1 - sum of the support's probabilities) [T, 1], in float64 because it cancels.

    The teacher's log-probs are float32, so a tail below their resolution is not known to be 0 and
    is set to that resolution; where the student has no tail at all (the support is the vocabulary)
    the teacher has none either.
    """
    left_T1 = 1.0 - teacher_TK.double().exp().sum(-1, keepdim=True)
    tail_T1 = left_T1.clamp(min=torch.finfo(torch.float32).eps).log().to(teacher_TK.dtype)
    return torch.where(torch.isneginf(student_tail_T1), -math.inf, tail_T1)
