"""Distillation losses from hidden states: student logits and teacher logits exist one chunk at a
time, and never [T, V].

Gradients to the student are complete when the forward pass ends; masked rows are left out before
both LM heads.

Shapes: T rows, L unmasked rows, H student and G teacher hidden, V student and W teacher vocabulary,
K teacher support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .gradients import keep_linear_gradients, linear_backward, or_empty
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
from .linear_chunks import LinearGradients, Needs, linear_gradients, spread
from .logit_map import LogitMap
from .metrics import JSD_METRICS, named
from .policy_inputs import Count, check_head, check_temperature, products_dtype
from .projection import Projection

_STUDENT = ("student_hidden_TH", "student_weight_VH", "student_bias_V")
_TEACHER = ("teacher_hidden_TG", "teacher_weight_WG", "teacher_bias_W")


def jsd_loss_from_hidden(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_TG: Tensor,
    teacher_weight_WG: Tensor,
    *,
    token_count: Count,
    mask_T: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias_V: Tensor | None = None,
    teacher_bias_W: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_soft_cap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_soft_cap: float | None = None,
) -> JsdLossOutput:
    """Sum over unmasked rows of the generalised Jensen-Shannon divergence, over the global
    `token_count`.

    beta: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher), as in Liger
    and TRL. Vocabularies may differ in size: see `jsd_reference.teacher_over`. Only the student
    gets gradients. logit_scale and soft_cap of the two heads as in `policy_loss_from_hidden`.
    Strided and expanded arguments are fine; what a masked row holds changes nothing. Raises
    ValueError for shapes, dtypes, devices, beta outside [0, 1] and temperatures that are not
    positive.
    """
    check_head(student_hidden_TH, student_weight_VH, student_bias_V, _STUDENT)
    check_head(teacher_hidden_TG, teacher_weight_WG, teacher_bias_W, _TEACHER)
    check_teacher_rows(
        "teacher_hidden_TG", teacher_hidden_TG, "student_hidden_TH", student_hidden_TH
    )
    mask = row_mask(mask_T, "student_hidden_TH", student_hidden_TH)
    check_beta(beta)
    check_temperature(temperature)
    scale = jsd_scale(token_count, student_weight_VH)
    teacher = [
        None if tensor is None else tensor.detach()
        for tensor in (teacher_hidden_TG, teacher_weight_WG, teacher_bias_W)
    ]
    student = (student_hidden_TH, student_weight_VH, student_bias_V)
    shapes = (
        LogitMap.of(student_logit_scale, student_soft_cap, "student_"),
        LogitMap.of(teacher_logit_scale, teacher_soft_cap, "teacher_"),
    )
    products = [
        products_dtype(student_hidden_TH, student_weight_VH),
        products_dtype(teacher_hidden_TG, teacher_weight_WG),
    ]
    loss, values_M, *_ = _jsd_hidden(
        *student, *teacher, mask, scale, beta, temperature,
        [shape.scale for shape in shapes], [shape.soft_cap or 0.0 for shape in shapes],
        *products, *_needs(*student),
    )  # fmt: skip
    return JsdLossOutput(loss, named(JSD_METRICS, values_M))


def jsd_loss_top_k_from_hidden(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    teacher_ids_TK: Tensor,
    teacher_log_probs_TK: Tensor,
    *,
    token_count: Count,
    mask_T: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias_V: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_soft_cap: float | None = None,
) -> JsdLossOutput:
    """The same from a teacher's top-k tokens alone: the divergence over those K tokens and the tail
    as one more category.

    teacher_ids_TK: distinct ids of a row, -1 (or any number below 0) pads shorter lists.
    teacher_log_probs_TK: at the
        same temperature as the student's.
    Raises ValueError as `jsd_loss_from_hidden` does and, on a CPU, for ids out of range and ids
    that a row holds twice (on a GPU an id beyond the vocabulary gives NaN, and nobody looks for
    doubles).
    """
    check_head(student_hidden_TH, student_weight_VH, student_bias_V, _STUDENT)
    mask = row_mask(mask_T, "student_hidden_TH", student_hidden_TH)
    support = support_of(teacher_ids_TK, teacher_log_probs_TK, mask)
    check_beta(beta)
    check_temperature(temperature)
    scale = jsd_scale(token_count, student_weight_VH)
    student = (student_hidden_TH, student_weight_VH, student_bias_V)
    shape = LogitMap.of(student_logit_scale, student_soft_cap, "student_")
    loss, values_M, *_ = _jsd_top_k_hidden(
        *student, *support, mask, scale, beta, temperature, shape.scale, shape.soft_cap,
        products_dtype(student_hidden_TH, student_weight_VH), *_needs(*student),
    )  # fmt: skip
    return JsdLossOutput(loss, named(JSD_METRICS, values_M))


def _needs(*tensors: Tensor | None) -> list[bool]:
    return [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in tensors
    ]


@torch.library.custom_op("zppo_kernels::jsd_loss_from_hidden", mutates_args=())
def _jsd_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    logit_scales: list[float],
    soft_caps: list[float],
    products: torch.dtype,
    teacher_products: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Projection.of(weight.to(products), bias)
    teacher_head = Projection.of(teacher_weight.to(teacher_products), teacher_bias)
    shape, teacher_shape = (
        LogitMap(scale_of, cap or None)
        for scale_of, cap in zip(logit_scales, soft_caps, strict=True)
    )
    backend, live_L = backend_for(head.weight_VH), mask.nonzero().squeeze(1)
    ones_L = torch.ones_like(live_L, dtype=torch.bool)
    teacher_LG = teacher_hidden.index_select(0, live_L).to(teacher_products)
    sums_2 = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    buffers: list[Tensor] = []

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        if not buffers:
            buffers.append(teacher_head.buffer(len(logits_CV)))
        teacher_CW = teacher_shape.apply_(
            teacher_head.logits(teacher_head.operand(teacher_LG[part]), buffers[0])
        )
        columns = backend.jsd(
            logits_CV, teacher_CW, ones_L[part], beta, temperature, gradient_CV, scale
        )
        sums_2.add_(torch.stack([column.sum(dtype=torch.float64) for column in columns]))

    needs = Needs(needs_hidden, needs_weight, needs_bias)
    hidden_LH = hidden.detach().index_select(0, live_L).to(products)
    gradients = linear_gradients(head, hidden_LH, needs, shape.around(row_gradient))
    return _results(sums_2, mask, scale, gradients, live_L, hidden, weight)


@torch.library.custom_op("zppo_kernels::jsd_loss_top_k_from_hidden", mutates_args=())
def _jsd_top_k_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_support_ids(teacher_ids, weight.shape[0])
    head, shape = Projection.of(weight.to(products), bias), LogitMap(logit_scale, soft_cap)
    backend, live_L = backend_for(head.weight_VH), mask.nonzero().squeeze(1)
    ids_LK, log_probs_LK = teacher_ids[live_L], teacher_log_probs[live_L]
    sums_2 = torch.zeros(2, dtype=torch.float64, device=hidden.device)

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        support = (ids_LK[part], log_probs_LK[part])
        columns = jsd_top_k_rows(
            backend, logits_CV, *support, beta, temperature, gradient_CV, scale
        )
        sums_2.add_(torch.stack([column.sum(dtype=torch.float64) for column in columns]))

    needs = Needs(needs_hidden, needs_weight, needs_bias)
    hidden_LH = hidden.detach().index_select(0, live_L).to(products)
    gradients = linear_gradients(head, hidden_LH, needs, shape.around(row_gradient))
    return _results(sums_2, mask, scale, gradients, live_L, hidden, weight)


def _results(
    sums_2: Tensor,
    mask: Tensor,
    scale: Tensor,
    gradients: LinearGradients,
    live_L: Tensor,
    hidden: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, JSD_METRICS and gradients; divergence and entropy sums come in."""
    metrics_M = torch.cat([mask.sum(dtype=torch.float64).unsqueeze(0), sums_2])
    gradient_TH = spread(gradients.hidden_LH, live_L, hidden)
    gradient_VH, gradient_V = (
        or_empty(gradients.weight_VH, weight),
        or_empty(gradients.bias_V, weight),
    )
    return (sums_2[0] * scale).to(scale.dtype), metrics_M, gradient_TH, gradient_VH, gradient_V


def _fake(
    hidden: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty, metrics = weight.new_empty(0), weight.new_empty(len(JSD_METRICS), dtype=torch.float64)
    return (
        torch.empty_like(scale),
        metrics,
        result_like(hidden, scale.dtype) if needs[0] else empty.clone(),
        result_like(weight, scale.dtype) if needs[1] else empty.clone(),
        weight.new_empty(len(weight), dtype=scale.dtype) if needs[2] else empty.clone(),
    )


@_jsd_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    logit_scales: list[float],
    soft_caps: list[float],
    products: torch.dtype,
    teacher_products: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake(hidden, weight, scale, (needs_hidden, needs_weight, needs_bias))


@_jsd_top_k_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    scale: Tensor,
    beta: float,
    temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake(hidden, weight, scale, (needs_hidden, needs_weight, needs_bias))


_jsd_hidden.register_autograd(
    linear_backward("jsd_loss_from_hidden", 14), setup_context=keep_linear_gradients
)
_jsd_top_k_hidden.register_autograd(
    linear_backward("jsd_loss_top_k_from_hidden", 12), setup_context=keep_linear_gradients
)
