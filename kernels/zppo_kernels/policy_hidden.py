"""The policy loss from hidden states and LM head: three matrix products, no [T, V] tensor.

Each chunk of logits is turned into its gradient in place by one row operation, and the gradients to
hidden states, weight and bias are complete when the forward pass ends. Rows whose mask or advantage
is zero have exactly zero gradient, known before any logit is computed: they are left out before the
LM head, while the denominator (`token_count`) still counts them.

Where the ratio or the weight is the sequence's, every log-prob of a sequence comes before its first
gradient, which takes a second pass over the logits.

On a CPU rows may share their hidden states, whose logits are then computed once
(`shared_states`).

Shapes: T rows, L live rows, U hidden states, H hidden, V vocabulary, S sequences, M metrics, P
partial results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .backends import backend_for
from .gradients import keep_linear_gradients, linear_backward, or_empty
from .layout import accumulator_of, result_like
from .linear_chunks import LinearGradients, Needs, linear_gradients, logit_chunks, spread
from .logit_map import LogitMap
from .metrics import LOGIT_METRICS, POLICY_METRICS, named, reduce_partials
from .policy_inputs import (
    Count,
    check_projection,
    checked_live_rows,
    checked_rows,
    prepare_rows,
    products_dtype,
)
from .policy_reference import PolicyLossOutput
from .policy_rows import PolicyRows, RowInputs
from .policy_terms import policy_terms
from .projection import Projection
from .settings import PolicyLossSettings, settings_from, settings_values
from .shared_states import Owned, shared_policy
from .support import check_support, over_support, with_map, with_support

_DEFAULTS = PolicyLossSettings()
_NO_GRADIENT = Needs(False, False, False)


def policy_loss_from_hidden(
    hidden_TH: Tensor,
    weight_VH: Tensor,
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
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    full_metrics: bool = False,
    live_rows_L: Tensor | None = None,
    hidden_rows_T: Tensor | None = None,
) -> PolicyLossOutput:
    """Policy loss (ZPPO Table 8 by default: PPO with asymmetric and dual clip) over packed rows.

    hidden_TH, weight_VH, bias_V: one dtype, or under autocast any that it casts; gradients flow to
        those that require them. logit_scale, soft_cap: what the head does to its product,
        `soft_cap * tanh(logit_scale * logit / soft_cap)`.
    target_ids_T: row t of the hidden states predicts this id; rows with id -100 or mask 0 take no
        part.
    sequence_ids_T, advantages_S: the advantage is looked up by sequence. advantages_T in its place:
        one per row, 0 takes a row out of the surrogate and leaves it in the denominator; ids of
        sequences are then below the number of rows.
    proximal_log_probs_T: the ratio is exp(policy - proximal). None: it is exactly 1, policy and
        proximal are the same weights.
    behaviour_log_probs_T: the importance weight is exp(proximal - behaviour).
    support_ids_TK: where sampling was truncated, the ids that could have been sampled, distinct,
        the target among them, -1 where there are fewer than K; softmax, entropy and gradient are
        over these alone. A row of -1 is over the whole vocabulary (`support`).
    token_count, sequence_count: global counts of the mini-batch (int or 0-dim tensor), the
        denominators; micro-batches and ranks pass the same count and their losses add.
    full_metrics: compute logits of zero-advantage rows too, for entropy and the like.
    live_rows_L: the rows with a gradient, distinct and in any order, where the caller knows them
        (rows left out lose theirs); on a GPU this saves the one synchronisation.
    hidden_rows_T: where rows share hidden states, which one each has; hidden_TH is then [U, H].

    Strided and expanded arguments are fine. What a masked row holds changes nothing, be it NaN or
    an id out of range. Raises ValueError for shapes, dtypes, devices and, on a CPU, ids of unmasked
    rows out of range (on a GPU such a row's loss is NaN; `live_rows_L` out of range is an error of
    the device).
    """
    check_projection(hidden_TH, weight_VH, bias_V, target_ids_T, hidden_rows_T)
    rows = prepare_rows(
        target_ids_T,
        like=weight_VH,
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
    if hidden_rows_T is not None and not _may_share(hidden_TH, rows, settings):
        hidden_TH, hidden_rows_T = hidden_TH.index_select(0, hidden_rows_T), None
    shape, temperature = LogitMap.of(logit_scale, soft_cap).with_temperature(settings.temperature)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_TH, weight_VH, bias_V)
    ]
    loss, values_M, log_probs_T, entropy_T, *_ = _policy_hidden(
        hidden_TH,
        weight_VH,
        bias_V,
        *rows.tensors(),
        live_rows_L,
        hidden_rows_T,
        *settings_values(replace(settings, temperature=temperature)),
        shape.scale,
        shape.soft_cap,
        products_dtype(hidden_TH, weight_VH),
        full_metrics,
        *needs,
    )
    return PolicyLossOutput(loss, named(POLICY_METRICS, values_M), log_probs_T, entropy_T)


def _may_share(hidden_TH: Tensor, rows: RowInputs, settings: PolicyLossSettings) -> bool:
    """Whether rows of one hidden state are computed together.

    On a GPU they are not: T hidden states of H numbers and as many gradients in float32 are held in
    place of U, and the head's three products are over T rows. Sharing them would wait for the
    device in each chunk, whose rows are found on it, and would add the gradients of a state's
    targets in the dtype of a bf16 head, where those of a sure state nearly cancel.
    """
    return (
        not hidden_TH.is_cuda
        and rows.support_ids_TK is None
        and not rows.need_whole_sequences(settings)
    )


@torch.library.custom_op("zppo_kernels::policy_loss_from_hidden", mutates_args=())
def _policy_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    live_rows: Tensor | None,
    hidden_rows: Tensor | None,
    numbers: list[float],
    choices: list[int],
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
    full_metrics: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics [M], log-probs, entropies and the gradients of loss by hidden states, weight
    and bias (empty where not needed)."""
    settings, shape = settings_from(numbers, choices), LogitMap(logit_scale, soft_cap)
    inputs = RowInputs(
        target_ids, sequence_ids, advantages, row_advantages, scales, mask,
        proximal, behaviour, reference, support,
    )  # fmt: skip
    rows = checked_rows(inputs, weight.shape[0]).looked_up(settings)
    check_support(support, rows.target_ids_T, weight.shape[0])
    head = Projection.of(weight.to(products), bias)
    backend = backend_for(head.weight_VH)
    rows, sample_metrics = backend.weighted(rows, settings)
    if live_rows is None:
        live_L = rows.live_T.nonzero().squeeze(1)
    else:
        live_L = checked_live_rows(live_rows, len(target_ids))
    parts = [(live_L, Needs(needs_hidden, needs_weight, needs_bias))]
    if full_metrics:
        parts.append(((rows.mask_T & ~rows.live_T).nonzero().squeeze(1), _NO_GRADIENT))
    statistics_2T = torch.zeros(2, len(target_ids), dtype=head.accumulator, device=hidden.device)
    results, states = [], []
    for index_L, needs in parts:
        owned = None
        if hidden_rows is not None:
            # Of rows that the caller names some may be masked.
            owned = Owned.of(hidden_rows, index_L[rows.mask_T[index_L]], len(hidden))
        index_L, states_L = (index_L, index_L) if owned is None else (owned.rows_L, owned.states_U)
        states.append(states_L)
        chosen_LH = _picked(hidden, states_L)
        all_rows = owned is None and len(index_L) == len(target_ids)
        chosen = rows if all_rows else rows.picked(index_L)
        evaluate = _evaluate if owned is None else partial(_evaluate_shared, owned)
        results.append(evaluate(head, shape, chosen_LH.to(products), chosen, settings, needs))
        statistics_2T[:, index_L] = results[-1].statistics_2L
    if rows.weights_come_late:
        evaluated_T = torch.zeros_like(rows.mask_T)
        evaluated_T[torch.cat([index_L for index_L, _ in parts])] = True
        sample_metrics = backend.late_metrics(
            sample_metrics, replace(rows, mask_T=evaluated_T), statistics_2T[0], settings
        )
    partials = torch.cat([result.partials_PM for result in results])
    values_M = torch.cat([sample_metrics, reduce_partials(LOGIT_METRICS, partials)])
    gradients = results[0].gradients
    return (
        results[0].loss,
        values_M,
        statistics_2T[0].clone(),
        statistics_2T[1].clone(),
        spread(gradients.hidden_LH, states[0], hidden),
        or_empty(gradients.weight_VH, weight),
        or_empty(gradients.bias_V, weight),
    )


@dataclass(frozen=True)
class _Evaluated:
    """Loss, partial LOGIT_METRICS, log-probs and entropies, and gradients over some rows."""

    loss: Tensor
    partials_PM: Tensor
    statistics_2L: Tensor
    gradients: LinearGradients


def _picked(hidden_TH: Tensor, index_L: Tensor) -> Tensor:
    """These hidden states; in rising order, so that all of them are what is there."""
    hidden_TH = hidden_TH.detach()
    return hidden_TH if len(index_L) == len(hidden_TH) else hidden_TH.index_select(0, index_L)


def _evaluate(
    head: Projection,
    shape: LogitMap,
    hidden_LH: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    needs: Needs,
) -> _Evaluated:
    if rows.need_whole_sequences(settings):
        return _evaluate_by_sequence(head, shape, hidden_LH, rows, settings, needs)
    backend, shape = with_map(backend_for(head.weight_VH), shape, rows.support_ids_TK)
    device = hidden_LH.device
    losses = [torch.zeros((), dtype=head.accumulator, device=device)]
    metrics = [torch.zeros(len(LOGIT_METRICS), dtype=torch.float64, device=device)]
    statistics_2L = torch.zeros(2, len(hidden_LH), dtype=head.accumulator, device=device)

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        chunk = rows.part(part)
        loss, values_M = over_support(backend, chunk).policy(
            logits_CV, chunk, settings, gradient_CV, statistics_2L[:, part]
        )
        losses.append(loss)
        metrics.append(values_M)

    gradients = linear_gradients(head, hidden_LH, needs, shape.around(row_gradient))
    return _Evaluated(torch.stack(losses).sum(), torch.stack(metrics), statistics_2L, gradients)


def _evaluate_shared(
    owned: Owned,
    head: Projection,
    shape: LogitMap,
    hidden_UH: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    needs: Needs,
) -> _Evaluated:
    """The same for rows that share the hidden states."""
    backend, device = backend_for(head.weight_VH), hidden_UH.device
    losses = [torch.zeros((), dtype=head.accumulator, device=device)]
    metrics = [torch.zeros(len(LOGIT_METRICS), dtype=torch.float64, device=device)]
    statistics_2L = torch.zeros(2, len(owned.rows_L), dtype=head.accumulator, device=device)

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        chunk, owners_L = owned.of_chunk(part)
        loss, values_M = shared_policy(
            backend, logits_CV, owners_L, rows.part(chunk), settings, gradient_CV,
            statistics_2L[:, chunk],
        )  # fmt: skip
        losses.append(loss)
        metrics.append(values_M)

    gradients = linear_gradients(head, hidden_UH, needs, shape.around(row_gradient))
    return _Evaluated(torch.stack(losses).sum(), torch.stack(metrics), statistics_2L, gradients)


def _evaluate_by_sequence(
    head: Projection,
    shape: LogitMap,
    hidden_LH: Tensor,
    rows: PolicyRows,
    settings: PolicyLossSettings,
    needs: Needs,
) -> _Evaluated:
    """First all log-probs, then the coefficients of every row, then its gradient from the logits
    computed once more."""
    backend, shape = with_map(backend_for(head.weight_VH), shape, rows.support_ids_TK)
    columns = [
        over_support(backend, rows.part(part)).statistics(
            shape.apply_(logits_CV), rows.target_ids_T[part], settings.temperature
        )
        for part, _, logits_CV in logit_chunks(head, hidden_LH)
    ]
    empty_L = torch.zeros(0, dtype=head.accumulator, device=hidden_LH.device)
    log_probs_L, entropy_L, lse_L = (
        torch.cat(column) for column in zip(*columns, (empty_L,) * 3, strict=True)
    )
    terms = policy_terms(log_probs_L, entropy_L, rows, settings)

    def row_gradient(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
        if gradient_CV is None:
            raise RuntimeError("the second pass runs only where a gradient is wanted")
        over_support(backend, rows.part(part)).policy_gradient(
            logits_CV, lse_L[part], entropy_L[part], terms.part(part), rows.target_ids_T[part],
            settings, gradient_CV,
        )  # fmt: skip

    wanted = hidden_LH if needs.any else hidden_LH[:0]
    gradients = linear_gradients(head, wanted, needs, shape.around(row_gradient))
    statistics_2L = torch.stack([log_probs_L, entropy_L])
    return _Evaluated(terms.loss, terms.metrics_M.unsqueeze(0), statistics_2L, gradients)


@_policy_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    live_rows: Tensor | None,
    hidden_rows: Tensor | None,
    numbers: list[float],
    choices: list[int],
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
    full_metrics: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulator = accumulator_of(weight)
    return (
        weight.new_empty((), dtype=accumulator),
        weight.new_empty(len(POLICY_METRICS), dtype=torch.float64),
        weight.new_empty(len(target_ids), dtype=accumulator),
        weight.new_empty(len(target_ids), dtype=accumulator),
        result_like(hidden, accumulator) if needs_hidden else hidden.new_empty(0),
        result_like(weight, accumulator) if needs_weight else weight.new_empty(0),
        weight.new_empty(len(weight), dtype=accumulator) if needs_bias else weight.new_empty(0),
    )


_policy_hidden.register_autograd(
    linear_backward("policy_loss_from_hidden", 21), setup_context=keep_linear_gradients
)
