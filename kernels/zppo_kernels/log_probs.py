"""Log-prob of the target and entropy of each row, without gradient: the proximal pass.

Invariant: allocates two vectors and one chunk of logits, never a gradient buffer; usable under
torch.compile and inside FSDP (custom operators with fake implementations).

Shapes: T rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .layout import accumulator_of, column
from .linear_chunks import logit_chunks
from .logit_map import LogitMap
from .policy_inputs import (
    IGNORED_TARGET,
    check_integer,
    check_logits,
    check_projection,
    check_targets,
    check_temperature,
    products_dtype,
)
from .projection import Projection
from .row_chunks import readable, row_chunks
from .shared_states import Owned, shared_statistics
from .support import check_support, over_support, prepared_support, with_map


def token_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    support_ids_TK: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    hidden_rows_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H], LM head [V, H], ids [T] -> (log-probs, entropy in nats), [T] each, no
    gradient.

    float32, or float64 where the head is. Rows of id -100 give 0; on a CPU their logits are not
    computed. Any layout. support_ids_TK, logit_scale, soft_cap and hidden_rows_T as in
    `policy_loss_from_hidden`.
    Raises ValueError as that does.
    """
    check_integer("target_ids_T", target_ids_T)
    check_projection(hidden_TH, weight_VH, bias_V, target_ids_T, hidden_rows_T)
    check_temperature(temperature)
    bias_V = None if bias_V is None else bias_V.detach()
    target_ids_T = column(target_ids_T, torch.int64)
    if hidden_rows_T is not None and (hidden_TH.is_cuda or support_ids_TK is not None):
        hidden_TH, hidden_rows_T = hidden_TH.index_select(0, hidden_rows_T), None
    shape, temperature = LogitMap.of(logit_scale, soft_cap).with_temperature(temperature)
    return _log_probs_from_hidden(
        hidden_TH.detach(),
        weight_VH.detach(),
        bias_V,
        target_ids_T,
        prepared_support(support_ids_TK, target_ids_T, target_ids_T != IGNORED_TARGET),
        hidden_rows_T,
        temperature,
        shape.scale,
        shape.soft_cap,
        products_dtype(hidden_TH, weight_VH),
    )


def token_log_probs_from_logits(
    logits_TV: Tensor,
    target_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    support_ids_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from logits [T, V] that exist already."""
    check_integer("target_ids_T", target_ids_T)
    check_logits(logits_TV, target_ids_T)
    check_temperature(temperature)
    target_ids_T = column(target_ids_T, torch.int64)
    support = prepared_support(support_ids_TK, target_ids_T, target_ids_T != IGNORED_TARGET)
    return _log_probs_from_logits(logits_TV.detach(), target_ids_T, support, temperature)


@torch.library.custom_op("zppo_kernels::token_log_probs", mutates_args=())
def _log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    support: Tensor | None,
    hidden_rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check_targets(target_ids, target_ids != IGNORED_TARGET, weight.shape[0])
    check_support(support, target_ids, weight.shape[0])
    head, shape = Projection.of(weight.to(products), bias), LogitMap(logit_scale, soft_cap)
    if hidden_rows is not None:
        return _of_shared_states(
            head, shape, hidden, target_ids, hidden_rows, temperature, products
        )
    backend, shape = with_map(backend_for(head.weight_VH), shape, support)
    results = torch.zeros(2, len(target_ids), dtype=head.accumulator, device=hidden.device)
    # On a GPU leaving rows out costs a synchronisation, and a proximal pass has few such rows.
    wanted = (target_ids != IGNORED_TARGET).nonzero().squeeze(1) if not hidden.is_cuda else None
    picked, targets = (
        (hidden, target_ids) if wanted is None else (hidden[wanted], target_ids[wanted])
    )
    picked = picked.to(products)
    supports = support if wanted is None or support is None else support[wanted]
    found = results if wanted is None else results.new_empty(2, len(wanted))
    for part, _, logits_CV in logit_chunks(head, picked):
        targets_C = targets[part]
        operations = over_support(backend, None if supports is None else supports[part])
        log_probs_C, entropy_C, _ = operations.statistics(
            shape.apply_(logits_CV), _looked_up(targets_C), temperature
        )
        found[:, part] = torch.where(
            targets_C != IGNORED_TARGET, torch.stack([log_probs_C, entropy_C]), 0.0
        )
    if wanted is not None:
        results[:, wanted] = found
    return results[0].clone(), results[1].clone()


def _of_shared_states(
    head: Projection,
    shape: LogitMap,
    hidden_UH: Tensor,
    target_ids_T: Tensor,
    hidden_rows_T: Tensor,
    temperature: float,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same for rows that share the hidden states."""
    wanted_L = (target_ids_T != IGNORED_TARGET).nonzero().squeeze(1)
    owned = Owned.of(hidden_rows_T, wanted_L, len(hidden_UH))
    targets_L, backend = target_ids_T[owned.rows_L], backend_for(head.weight_VH)
    results = torch.zeros(2, len(target_ids_T), dtype=head.accumulator, device=hidden_UH.device)
    for part, _, logits_CV in logit_chunks(head, hidden_UH[owned.states_U].to(products)):
        chunk, owners_L = owned.of_chunk(part)
        found = shared_statistics(
            backend, shape.apply_(logits_CV), owners_L, targets_L[chunk], temperature
        )
        results[:, owned.rows_L[chunk]] = torch.stack([found.log_probs_L, found.entropy_L])
    return results[0].clone(), results[1].clone()


@_log_probs_from_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    support: Tensor | None,
    hidden_rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    soft_cap: float | None,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _fake_result(weight, target_ids), _fake_result(weight, target_ids)


@torch.library.custom_op("zppo_kernels::token_log_probs_from_logits", mutates_args=())
def _log_probs_from_logits(
    logits: Tensor, target_ids: Tensor, support: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    check_targets(target_ids, target_ids != IGNORED_TARGET, logits.shape[1])
    check_support(support, target_ids, logits.shape[1])
    backend = backend_for(logits)
    results = _fake_result(logits, target_ids).repeat(2, 1)
    for part in row_chunks(logits):
        targets_C = target_ids[part]
        operations = over_support(backend, None if support is None else support[part])
        log_probs_C, entropy_C, _ = operations.statistics(
            readable(logits[part]), _looked_up(targets_C), temperature
        )
        results[:, part] = torch.where(
            targets_C != IGNORED_TARGET, torch.stack([log_probs_C, entropy_C]), 0.0
        )
    return results[0].clone(), results[1].clone()


@_log_probs_from_logits.register_fake
def _(
    logits: Tensor, target_ids: Tensor, support: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    return _fake_result(logits, target_ids), _fake_result(logits, target_ids)


def _looked_up(target_ids_C: Tensor) -> Tensor:
    """Token 0 for rows whose result is thrown away; any other id stays, and is NaN where it does
    not exist."""
    return torch.where(target_ids_C == IGNORED_TARGET, 0, target_ids_C)


def _fake_result(like: Tensor, target_ids: Tensor) -> Tensor:
    return like.new_empty(len(target_ids), dtype=accumulator_of(like))
