"""Distillation losses from materialised logits, with the gradient to the student formed in the
forward pass.

Shapes: T rows, V student and W teacher vocabulary, K teacher support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .gradients import keep_logits_gradient, logits_backward
from .jsd_inputs import (
    check_beta,
    check_support_ids,
    check_teacher_rows,
    jsd_scale,
    row_mask,
    support_of,
)
from .jsd_reference import JsdLossOutput
from .jsd_top_k_rows import jsd_top_k_rows
from .layout import result_like
from .metrics import JSD_METRICS, named
from .policy_inputs import Count, check_matrix, check_temperature
from .row_chunks import deliver, destination_of, readable, row_chunks


def jsd_loss_from_logits(
    student_logits_TV: Tensor,
    teacher_logits_TW: Tensor,
    *,
    token_count: Count,
    mask_T: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> JsdLossOutput:
    """`jsd_loss_from_hidden` for logits that exist already; arguments and errors as there."""
    check_matrix("student_logits_TV", student_logits_TV)
    check_matrix("teacher_logits_TW", teacher_logits_TW)
    check_teacher_rows(
        "teacher_logits_TW", teacher_logits_TW, "student_logits_TV", student_logits_TV
    )
    mask = row_mask(mask_T, "student_logits_TV", student_logits_TV)
    check_beta(beta)
    check_temperature(temperature)
    scale = jsd_scale(token_count, student_logits_TV)
    wants = torch.is_grad_enabled() and student_logits_TV.requires_grad
    loss, values_M, _ = _jsd_logits(
        student_logits_TV, teacher_logits_TW.detach(), mask, scale, beta, temperature, wants
    )
    return JsdLossOutput(loss, named(JSD_METRICS, values_M))


def jsd_loss_top_k_from_logits(
    student_logits_TV: Tensor,
    teacher_ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    *,
    token_count: Count,
    mask_T: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> JsdLossOutput:
    """`jsd_loss_top_k_from_hidden` for logits that exist already; arguments and errors as there."""
    check_matrix("student_logits_TV", student_logits_TV)
    mask = row_mask(mask_T, "student_logits_TV", student_logits_TV)
    support = support_of(teacher_ids_TK, teacher_log_probs_TK, mask)
    check_beta(beta)
    check_temperature(temperature)
    scale = jsd_scale(token_count, student_logits_TV)
    wants = torch.is_grad_enabled() and student_logits_TV.requires_grad
    loss, values_M, _ = _jsd_top_k_logits(
        student_logits_TV, *support, mask, scale, beta, temperature, wants
    )
    return JsdLossOutput(loss, named(JSD_METRICS, values_M))


@torch.library.custom_op("zppo_kernels::jsd_loss_from_logits", mutates_args=())
def _jsd_logits(
    logits: Tensor,
    teacher: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient_TV = result_like(logits) if wants_gradient else None
    sums_2 = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for part in row_chunks(logits, teacher):
        logits_CV = readable(logits[part])
        gradient_CV = destination_of(logits_CV, gradient_TV, part)
        columns = backend_for(logits).jsd(
            logits_CV, readable(teacher[part]), mask[part], beta, temperature, gradient_CV, scale
        )
        sums_2 += torch.stack([column.sum(dtype=torch.float64) for column in columns])
        deliver(gradient_CV, gradient_TV, part)
    return _results(sums_2, mask, scale, logits, gradient_TV)


@torch.library.custom_op("zppo_kernels::jsd_loss_top_k_from_logits", mutates_args=())
def _jsd_top_k_logits(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_support_ids(teacher_ids, logits.shape[1])
    gradient_TV = result_like(logits) if wants_gradient else None
    sums_2 = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for part in row_chunks(logits):
        logits_CV = readable(
            logits[part]
        ).clone()  # the row operation takes the support out of its logits
        gradient_CV = destination_of(logits_CV, gradient_TV, part)
        support = (teacher_ids[part], teacher_log_probs[part])
        columns = jsd_top_k_rows(
            backend_for(logits), logits_CV, *support, beta, temperature, gradient_CV, scale
        )
        masked = [
            torch.where(mask[part], column, 0.0).sum(dtype=torch.float64) for column in columns
        ]
        sums_2 += torch.stack(masked)
        if gradient_CV is not None:
            gradient_CV.masked_fill_(~mask[part].unsqueeze(1), 0.0)
        deliver(gradient_CV, gradient_TV, part)
    return _results(sums_2, mask, scale, logits, gradient_TV)


def _results(
    sums_2: Tensor, mask: Tensor, scale: Tensor, logits: Tensor, gradient_TV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    metrics_M = torch.cat([mask.sum(dtype=torch.float64).unsqueeze(0), sums_2])
    gradient = logits.new_empty(0) if gradient_TV is None else gradient_TV
    return (sums_2[0] * scale).to(scale.dtype), metrics_M, gradient


def _fake(logits: Tensor, scale: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    metrics = logits.new_empty(len(JSD_METRICS), dtype=torch.float64)
    return (
        torch.empty_like(scale),
        metrics,
        result_like(logits) if wants_gradient else logits.new_empty(0),
    )


@_jsd_logits.register_fake
def _(
    logits: Tensor,
    teacher: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(logits, scale, wants_gradient)


@_jsd_top_k_logits.register_fake
def _(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(logits, scale, wants_gradient)


_jsd_logits.register_autograd(
    logits_backward("jsd_loss_from_logits", 6), setup_context=keep_logits_gradient
)
_jsd_top_k_logits.register_autograd(
    logits_backward("jsd_loss_top_k_from_logits", 7), setup_context=keep_logits_gradient
)
