"""The clipped policy loss from hidden states and LM head: three matrix products, no [T, V] tensor.

Each chunk of logits is turned into its gradient in place by one row operation, and the gradients to
hidden states, weight and bias are complete when the forward pass ends. Rows whose mask or advantage
is zero have exactly zero gradient, known before any logit is computed: they are left out before the
LM head, while the denominator (`token_count`) still counts them.

The sequence-level ratio needs every log-prob of a sequence before its first gradient, so it takes a
second pass over the logits.

Shapes: T rows, L live rows, H hidden, V vocabulary, S sequences, M metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .gradients import keep_linear_gradients, linear_backward, or_empty
from .layout import accumulator_of, result_like
from .linear_chunks import LinearGradients, Needs, linear_gradients, logit_chunks, spread
from .metrics import LOGIT_METRICS, POLICY_METRICS, named, reduce_partials
from .policy_inputs import Count, check_projection, checked_live_rows, checked_rows, prepare_rows
from .policy_reference import PolicyLossOutput, PolicyRows, live_of
from .policy_terms import policy_terms
from .projection import Projection
from .settings import PolicyLossSettings, settings_from, settings_values

_DEFAULTS = PolicyLossSettings()


def policy_loss_from_hidden(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_ids_T: Tensor,
    *,
    sequence_ids_T: Tensor,
    advantages_S: Tensor,
    proximal_log_probs_T: Tensor,
    token_count: Count,
    behaviour_log_probs_T: Tensor | None = None,
    reference_log_probs_T: Tensor | None = None,
    mask_T: Tensor | None = None,
    sequence_count: Count | None = None,
    settings: PolicyLossSettings = _DEFAULTS,
    bias_V: Tensor | None = None,
    full_metrics: bool = False,
    live_rows_L: Tensor | None = None,
) -> PolicyLossOutput:
    """Clipped surrogate (ZPPO Table 8; PPO with asymmetric and dual clip) over packed rows.

    hidden_TH, weight_VH, bias_V: one dtype; gradients flow to those that require them.
    target_ids_T: row t of the hidden states predicts this id; rows with id -100 or mask 0 take no
    part. sequence_ids_T, advantages_S: the advantage is looked up by sequence.
    proximal_log_probs_T: the ratio is exp(policy - proximal). behaviour_log_probs_T: the importance
    weight is exp(proximal - behaviour). token_count, sequence_count: global counts of the
    mini-batch (int or 0-dim tensor), the denominators; micro-batches
        and ranks pass the same count and their losses add.
    full_metrics: compute logits of zero-advantage rows too, for entropy and the like. live_rows_L:
    the rows with a gradient, distinct and in any order, where the caller knows them (rows left out
    lose
        theirs); on a GPU this saves the one synchronisation.

    Strided and expanded arguments are fine. What a masked row holds changes nothing, be it NaN or
    an id out of range. Raises ValueError for shapes, dtypes, devices and, on a CPU, ids of unmasked
    rows out of range (on a GPU such a row's loss is NaN; `live_rows_L` out of range is an error of
    the device).
    """
    check_projection(hidden_TH, weight_VH, bias_V, target_ids_T)
    rows = prepare_rows(
        target_ids_T,
        like=weight_VH,
        sequence_ids_T=sequence_ids_T,
        advantages_S=advantages_S,
        proximal_log_probs_T=proximal_log_probs_T,
        behaviour_log_probs_T=behaviour_log_probs_T,
        reference_log_probs_T=reference_log_probs_T,
        mask_T=mask_T,
        token_count=token_count,
        sequence_count=sequence_count,
        settings=settings,
    )
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_TH, weight_VH, bias_V)
    ]
    loss, values_M, *_ = _policy_hidden(
        hidden_TH,
        weight_VH,
        bias_V,
        *rows.tensors(),
        live_rows_L,
        *settings_values(settings),
        full_metrics,
        *needs,
    )
    return PolicyLossOutput(loss, named(POLICY_METRICS, values_M))


@torch.library.custom_op("zppo_kernels::policy_loss_from_hidden", mutates_args=())
def _policy_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    scales: Tensor,
    proximal: Tensor,
    mask: Tensor,
    behaviour: Tensor | None,
    reference: Tensor | None,
    live_rows: Tensor | None,
    numbers: list[float],
    correction: str,
    ratio_level: str,
    full_metrics: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics [M] and the gradients of loss by hidden states, weight and bias (empty where
    not needed)."""
    rows = PolicyRows(
        target_ids, sequence_ids, advantages, scales, proximal, mask, behaviour, reference
    )
    rows = checked_rows(rows, weight.shape[0])
    settings = settings_from(numbers, correction, ratio_level)
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    head = Projection.of(weight, bias)
    rows, sample_metrics = backend_for(head.weight_VH).weighted(rows, settings)
    if live_rows is None:
        live_L = live_of(rows, settings).nonzero().squeeze(1)
    else:
        live_L = checked_live_rows(live_rows, len(hidden))
    loss, partials, gradients = _evaluate(head, *_picked(hidden, rows, live_L), settings, needs)
    if full_metrics:
        dead = (rows.mask_T & ~live_of(rows, settings)).nonzero().squeeze(1)
        _, dead_partials, _ = _evaluate(
            head, *_picked(hidden, rows, dead), settings, Needs(False, False, False)
        )
        partials = torch.cat([partials, dead_partials])
    values_M = torch.cat([sample_metrics, reduce_partials(LOGIT_METRICS, partials)])
    gradient_TH = spread(gradients.hidden_LH, live_L, hidden)
    return (
        loss,
        values_M,
        gradient_TH,
        or_empty(gradients.weight_VH, weight),
        or_empty(gradients.bias_V, weight),
    )


def _picked(hidden_TH: Tensor, rows: PolicyRows, index_L: Tensor) -> tuple[Tensor, PolicyRows]:
    if len(index_L) == len(hidden_TH):
        return hidden_TH.detach(), rows
    return hidden_TH.detach().index_select(0, index_L), rows.picked(index_L)


def _evaluate(
    head: Projection,
    hidden_LH: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    needs: Needs,
) -> tuple[Tensor, Tensor, LinearGradients]:
    """Loss, partial LOGIT_METRICS [P, M] and gradients over these rows."""
    if settings.ratio_level == "sequence":
        return _evaluate_by_sequence(head, hidden_LH, rows, settings, needs)
    backend = backend_for(head.weight_VH)
    losses: list[Tensor] = []
    metrics: list[Tensor] = []

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        loss, values_M = backend.policy(logits_CV, rows.part(part), settings, gradient_CV)
        losses.append(loss)
        metrics.append(values_M)

    gradients = linear_gradients(head, hidden_LH, needs, row_gradient)
    zeros_M = torch.zeros(len(LOGIT_METRICS), dtype=torch.float64, device=hidden_LH.device)
    loss = (
        torch.stack(losses).sum()
        if losses
        else torch.zeros((), dtype=head.accumulator, device=hidden_LH.device)
    )
    return loss, torch.stack([zeros_M, *metrics]), gradients


def _evaluate_by_sequence(
    head: Projection,
    hidden_LH: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    needs: Needs,
) -> tuple[Tensor, Tensor, LinearGradients]:
    """First all log-probs, then the coefficients of every row, then its gradient from the logits
    computed once more."""
    backend, temperature = backend_for(head.weight_VH), settings.temperature
    columns = [
        backend.statistics(logits_CV, rows.target_ids_T[part], temperature)
        for part, _, logits_CV in logit_chunks(head, hidden_LH)
    ]
    empty_L = torch.zeros(0, dtype=head.accumulator, device=hidden_LH.device)
    log_probs_L, entropy_L, lse_L = (
        torch.cat(column) for column in zip(*columns, (empty_L,) * 3, strict=True)
    )
    terms = policy_terms(log_probs_L, entropy_L, rows, settings)
    slopes_L = terms.coefficients_L / temperature

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        if gradient_CV is None:
            raise RuntimeError("the second pass runs only where a gradient is wanted")
        backend.gradient(
            logits_CV,
            lse_L[part],
            -slopes_L[part],
            rows.target_ids_T[part],
            slopes_L[part],
            temperature,
            gradient_CV,
        )

    wanted = hidden_LH if needs.any else hidden_LH[:0]
    return (
        terms.loss,
        terms.metrics_M.unsqueeze(0),
        linear_gradients(head, wanted, needs, row_gradient),
    )


@_policy_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    scales: Tensor,
    proximal: Tensor,
    mask: Tensor,
    behaviour: Tensor | None,
    reference: Tensor | None,
    live_rows: Tensor | None,
    numbers: list[float],
    correction: str,
    ratio_level: str,
    full_metrics: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulator = accumulator_of(weight)
    return (
        weight.new_empty((), dtype=accumulator),
        weight.new_empty(len(POLICY_METRICS), dtype=torch.float64),
        result_like(hidden) if needs_hidden else hidden.new_empty(0),
        result_like(weight, accumulator) if needs_weight else weight.new_empty(0),
        weight.new_empty(len(weight), dtype=accumulator) if needs_bias else weight.new_empty(0),
    )


_policy_hidden.register_autograd(
    linear_backward("policy_loss_from_hidden", 16), setup_context=keep_linear_gradients
)
