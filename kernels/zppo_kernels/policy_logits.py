"""The policy loss from materialised logits, with the gradient formed in the forward pass.

One row operation reads the logits and writes their gradient, into a new tensor or (in_place) over
the logits themselves. Rows whose mask or advantage is zero do not enter, whatever their logits;
their gradient is written as 0.

Shapes: T rows, V vocabulary, S sequences, M metrics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import backend_for
from .gradients import keep_logits_gradient, logits_backward, refuse_double_backward
from .layout import accumulator_of, check_in_place, result_like
from .metrics import LOGIT_METRICS, POLICY_METRICS, named, reduce_partials
from .policy_inputs import Count, check_logits, checked_rows, prepare_rows
from .policy_reference import PolicyLossOutput
from .policy_rows import PolicyRows, RowInputs
from .policy_terms import policy_terms
from .row_chunks import deliver, destination_of, readable, row_chunks
from .settings import PolicyLossSettings, settings_from, settings_values
from .support import check_support, over_support, with_support

_DEFAULTS = PolicyLossSettings()


def policy_loss_from_logits(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    *,
    sequence_ids_T: Tensor,
    token_count: Count,
    advantages_S: Tensor | None = None,
    advantages_T: Tensor | None = None,
    proximal_log_probs_T: Tensor | None = None,
    behaviour_log_probs_T: Tensor | None = None,
    reference_log_probs_T: Tensor | None = None,
    support_ids_TK: Tensor | None = None,
    mask_T: Tensor | None = None,
    sequence_count: Count | None = None,
    settings: PolicyLossSettings = _DEFAULTS,
    full_metrics: bool = False,
    in_place: bool = False,
) -> PolicyLossOutput:
    """`policy_loss_from_hidden` for logits that exist already; arguments and errors as there.

    logits_TV: as the head gives them, before division by the temperature, in any layout; the
        gradient has their dtype and is contiguous.
    in_place: the logits' storage becomes the gradient's (no second [T, V] tensor); the logits are
        gone afterwards, and a second backward pass raises RuntimeError. ValueError for a leaf,
        columns that do not lie side by side, and rows that share memory. Without a gradient to
        form, nothing is overwritten.
    """
    check_logits(logits_TV, target_ids_T)
    rows = prepare_rows(
        target_ids_T,
        like=logits_TV,
        sequence_ids_T=sequence_ids_T,
        advantages_S=advantages_S,
        advantages_T=advantages_T,
        proximal_log_probs_T=proximal_log_probs_T,
        behaviour_log_probs_T=behaviour_log_probs_T,
        reference_log_probs_T=reference_log_probs_T,
        mask_T=mask_T,
        token_count=token_count,
        sequence_count=sequence_count,
        settings=settings,
    )
    rows = with_support(rows, support_ids_TK)
    wants_gradient = torch.is_grad_enabled() and logits_TV.requires_grad
    if in_place and wants_gradient:
        check_in_place("logits_TV", logits_TV)
        loss, values_M, log_probs_T, entropy_T = _InPlace.apply(
            logits_TV, rows, settings, full_metrics
        )
    else:
        loss, values_M, log_probs_T, entropy_T, _ = _policy_logits(
            logits_TV, *rows.tensors(), *settings_values(settings), full_metrics, wants_gradient
        )
    return PolicyLossOutput(loss, named(POLICY_METRICS, values_M), log_probs_T, entropy_T)


def _evaluate(
    logits_TV: Tensor,
    inputs: RowInputs,
    settings: PolicyLossSettings,
    full_metrics: bool,
    gradient_TV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics [M], log-probs and entropies; the gradient goes to `gradient_TV`, which may be
    the logits."""
    rows = checked_rows(inputs, logits_TV.shape[1]).looked_up(settings)
    check_support(rows.support_ids_TK, rows.target_ids_T, logits_TV.shape[1])
    backend = backend_for(logits_TV)
    rows, sample_metrics = backend.weighted(rows, settings)
    rows = rows if full_metrics else replace(rows, mask_T=rows.live_T)
    evaluate = _by_sequence if rows.need_whole_sequences(settings) else _by_token
    loss, partials, statistics_2T = evaluate(logits_TV, rows, settings, gradient_TV)
    if rows.weights_come_late:
        sample_metrics = backend.late_metrics(sample_metrics, rows, statistics_2T[0], settings)
    values_M = torch.cat([sample_metrics, reduce_partials(LOGIT_METRICS, partials)])
    return loss, values_M, statistics_2T[0].clone(), statistics_2T[1].clone()


def _by_token(
    logits_TV: Tensor, rows: PolicyRows, settings: PolicyLossSettings, gradient_TV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    backend, device = backend_for(logits_TV), logits_TV.device
    losses = [torch.zeros((), dtype=accumulator_of(logits_TV), device=device)]
    partials = [torch.zeros(len(LOGIT_METRICS), dtype=torch.float64, device=device)]
    statistics_2T = torch.zeros(2, len(logits_TV), dtype=accumulator_of(logits_TV), device=device)
    for part in row_chunks(logits_TV):
        logits_CV = readable(logits_TV[part])
        gradient_CV = destination_of(logits_CV, gradient_TV, part)
        chunk = rows.part(part)
        loss, values_M = over_support(backend, chunk).policy(
            logits_CV, chunk, settings, gradient_CV, statistics_2T[:, part]
        )
        deliver(gradient_CV, gradient_TV, part)
        losses.append(loss)
        partials.append(values_M)
    return torch.stack(losses).sum(), torch.stack(partials), statistics_2T


def _by_sequence(
    logits_TV: Tensor, rows: PolicyRows, settings: PolicyLossSettings, gradient_TV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All log-probs first, then coefficients, then gradients."""
    backend = backend_for(logits_TV)
    empty_T = torch.zeros(0, dtype=accumulator_of(logits_TV), device=logits_TV.device)
    columns = [
        over_support(backend, rows.part(part)).statistics(
            readable(logits_TV[part]), rows.target_ids_T[part], settings.temperature
        )
        for part in row_chunks(logits_TV)
    ]
    log_probs_T, entropy_T, lse_T = (
        torch.cat(column) for column in zip(*columns, (empty_T,) * 3, strict=True)
    )
    terms = policy_terms(log_probs_T, entropy_T, rows, settings)
    for part in row_chunks(logits_TV):
        logits_CV = readable(logits_TV[part])
        gradient_CV = destination_of(logits_CV, gradient_TV, part)
        if gradient_CV is None:
            break
        over_support(backend, rows.part(part)).policy_gradient(
            logits_CV, lse_T[part], entropy_T[part], terms.part(part), rows.target_ids_T[part],
            settings, gradient_CV,
        )  # fmt: skip
        deliver(gradient_CV, gradient_TV, part)
    statistics_2T = torch.where(rows.mask_T, torch.stack([log_probs_T, entropy_T]), 0.0)
    return terms.loss, terms.metrics_M.unsqueeze(0), statistics_2T


@torch.library.custom_op("zppo_kernels::policy_loss_from_logits", mutates_args=())
def _policy_logits(
    logits: Tensor,
    target_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor | None,
    row_advantages: Tensor | None,
    scales: Tensor,
    mask: Tensor,
    proximal: Tensor | None,
    behaviour: Tensor | None,
    reference: Tensor | None,
    support: Tensor | None,
    numbers: list[float],
    choices: list[int],
    full_metrics: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics [M], log-probs, entropies and the gradient of the loss by the logits (empty
    where not wanted)."""
    inputs = RowInputs(
        target_ids, sequence_ids, advantages, row_advantages, scales, mask,
        proximal, behaviour, reference, support,
    )  # fmt: skip
    gradient_TV = result_like(logits) if wants_gradient else None
    results = _evaluate(logits, inputs, settings_from(numbers, choices), full_metrics, gradient_TV)
    return *results, logits.new_empty(0) if gradient_TV is None else gradient_TV


@_policy_logits.register_fake
def _(
    logits: Tensor,
    target_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor | None,
    row_advantages: Tensor | None,
    scales: Tensor,
    mask: Tensor,
    proximal: Tensor | None,
    behaviour: Tensor | None,
    reference: Tensor | None,
    support: Tensor | None,
    numbers: list[float],
    choices: list[int],
    full_metrics: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulator_of(logits))
    values_M = logits.new_empty(len(POLICY_METRICS), dtype=torch.float64)
    columns = [logits.new_empty(len(logits), dtype=loss.dtype) for _ in range(2)]
    gradient_TV = result_like(logits) if wants_gradient else logits.new_empty(0)
    return loss, values_M, columns[0], columns[1], gradient_TV


_policy_logits.register_autograd(
    logits_backward("policy_loss_from_logits", 14), setup_context=keep_logits_gradient
)


class _InPlace(torch.autograd.Function):
    """The same loss, its gradient written over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        inputs: RowInputs,
        settings: PolicyLossSettings,
        full_metrics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        storage_TV = (
            logits_TV.detach()
        )  # shares the version counter: whoever saved the logits for its backward will say so
        results = _evaluate(storage_TV, inputs, settings, full_metrics, storage_TV)
        torch.autograd.graph.increment_version(logits_TV)
        ctx.gradient_TV = storage_TV
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("policy_loss_from_logits")
        if ctx.gradient_TV is None:
            raise RuntimeError(
                "the in-place gradient was given out already; use in_place=False to run backward "
                "twice"
            )
        gradient_TV, ctx.gradient_TV = ctx.gradient_TV, None
        if outer[0] is not None:
            backend_for(gradient_TV).scale(gradient_TV, outer[0])
        return gradient_TV if outer[0] is not None else None, None, None, None
