"""Divergence and gradient of one chunk of rows, written out: what the distillation losses compute
on every backend.

With q, t the student's and teacher's probabilities and m = beta * t + (1 - beta) * q, the gradient
by the student's logits is `q * (h - sum(q * h)) / temperature`, where h is the derivative by q: (1
- beta) * log(q / m) between the ends, -t / q for the forward KL and log(q / t) for the reverse KL
(constants cancel). Products q * h are formed without dividing by q.

Shapes: C rows, V student vocabulary, W teacher vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .jsd_reference import jsd_of_log_probs, teacher_over


def weighted_slopes(student_TC: Tensor, teacher_TC: Tensor, beta: float) -> Tensor:
    """q * h per category, 0 where q is 0; log-probs in."""
    q_TC = student_TC.exp()
    if beta == 0.0:
        return -teacher_TC.exp()
    if beta == 1.0:
        other_TC, factor = teacher_TC, 1.0
    else:
        other_TC = torch.logaddexp(teacher_TC + math.log(beta), student_TC + math.log1p(-beta))
        factor = 1.0 - beta
    return torch.where(q_TC == 0, 0.0, factor * q_TC * (student_TC - other_TC))


def jsd_rows(
    student_CV: Tensor,
    teacher_CW: Tensor,
    beta: float,
    temperature: float,
    gradient_CV: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits in; divergence [C] and student entropy [C] out; scale * gradient, if wanted, to
    `gradient_CV`."""
    log_q_CV = torch.log_softmax(student_CV / temperature, dim=-1)
    log_t_CV = teacher_over(student_CV.shape[1], teacher_CW.to(student_CV.dtype), temperature)
    divergence_C = jsd_of_log_probs(log_q_CV, log_t_CV, beta)
    q_CV = log_q_CV.exp()
    entropy_C = -torch.where(q_CV == 0, 0.0, q_CV * log_q_CV).sum(-1)
    if gradient_CV is not None:
        slopes_CV = weighted_slopes(log_q_CV, log_t_CV, beta)
        gradient_CV.copy_(
            (slopes_CV - q_CV * slopes_CV.sum(-1, keepdim=True)) * (scale / temperature)
        )
    return divergence_C, entropy_C
