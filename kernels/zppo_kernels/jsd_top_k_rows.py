"""The same divergence where only a teacher's top-k tokens are known, as from a remote teacher: K
tokens and a tail.

Invariant: the student's tail is summed over the logits outside the support, never formed as 1 -
sum, which cancels.

Shapes: C rows, V student vocabulary, K teacher support; the last of K + 1 categories is the tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .jsd_reference import jsd_of_log_probs, teacher_tail
from .jsd_rows import weighted_slopes
from .layout import accumulator_of
from .rows_torch import TorchRows


def jsd_top_k_rows(
    backend: TorchRows,
    student_CV: Tensor,
    teacher_ids_CK: Tensor,
    teacher_log_probs_CK: Tensor,
    beta: float,
    temperature: float,
    gradient_CV: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `jsd_rows` with the teacher's K tokens (ids below 0 are padding, beyond the vocabulary
    they make the row NaN) and its tail as one category. Overwrites the logits.

    The support is taken out of the logits (set to -inf), so that one pass over the row gives the
    student's tail exactly, and the gradient of the tail is one softmax row with a single
    coefficient.
    """
    padding_CK, outside_CK = teacher_ids_CK < 0, teacher_ids_CK >= student_CV.shape[1]
    ids_CK = teacher_ids_CK.clamp(min=0, max=student_CV.shape[1] - 1)
    picked_CK = student_CV.gather(1, ids_CK).to(accumulator_of(student_CV)) / temperature
    picked_CK = torch.where(padding_CK, -math.inf, torch.where(outside_CK, math.nan, picked_CK))
    student_CV.scatter_add_(1, ids_CK, torch.where(padding_CK, 0.0, -math.inf).to(student_CV.dtype))
    _, tail_entropy_C, tail_lse_C = backend.statistics(
        student_CV, ids_CK[:, 0].contiguous(), temperature
    )
    lse_C = torch.logaddexp(torch.logsumexp(picked_CK, -1), tail_lse_C)
    student_CC = torch.cat([picked_CK - lse_C.unsqueeze(1), (tail_lse_C - lse_C).unsqueeze(1)], 1)
    teacher_CK = torch.where(padding_CK, -math.inf, teacher_log_probs_CK.to(student_CC.dtype))
    teacher_CC = torch.cat([teacher_CK, teacher_tail(teacher_CK, student_CC[:, -1:])], 1)
    divergence_C = jsd_of_log_probs(student_CC, teacher_CC, beta)
    q_CC = student_CC.exp()
    inner_C = -torch.where(q_CC == 0, 0.0, q_CC * student_CC).sum(-1)
    entropy_C = inner_C + torch.where(q_CC[:, -1] == 0, 0.0, q_CC[:, -1] * tail_entropy_C)
    if gradient_CV is not None:
        slopes_CC = weighted_slopes(student_CC, teacher_CC, beta)
        result_CC = (slopes_CC - q_CC * slopes_CC.sum(-1, keepdim=True)) * (scale / temperature)
        # Every token of the tail shares the tail's gradient in proportion to its probability.
        tail_C = torch.where(q_CC[:, -1] == 0, 0.0, result_CC[:, -1] / q_CC[:, -1])
        zeros_C = torch.zeros_like(tail_C)
        backend.gradient(
            student_CV, lse_C, tail_C, ids_CK[:, 0].contiguous(), zeros_C, temperature, gradient_CV
        )
        support_CK = torch.where(padding_CK, 0.0, result_CC[:, :-1])
        gradient_CV.scatter_add_(1, ids_CK, support_CK.to(gradient_CV.dtype))
    return divergence_C, entropy_C
