"""Checks and completes the row inputs of the policy loss, so that every path below may trust them.

Invariant: after `prepare_rows` all tensors are on one device and contiguous, statistics have the
accumulator's dtype, ids are int64, the mask is bool, both ids of a masked row are 0 whatever they
were, and `scales_S` holds the whole normalisation. After `checked_rows` every sequence id is inside
what it indexes.

Shapes: T rows, H hidden, V vocabulary, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .layout import accumulator_of, column
from .policy_rows import RowInputs
from .settings import PolicyLossSettings

IGNORED_TARGET = -100
Count = int | float | Tensor


def prepare_rows(
    target_ids_T: Tensor,
    *,
    like: Tensor,
    sequence_ids_T: Tensor,
    token_count: Count,
    settings: PolicyLossSettings,
    advantages_S: Tensor | None = None,
    advantages_T: Tensor | None = None,
    proximal_log_probs_T: Tensor | None = None,
    behaviour_log_probs_T: Tensor | None = None,
    reference_log_probs_T: Tensor | None = None,
    mask_T: Tensor | None = None,
    sequence_count: Count | None = None,
) -> RowInputs:
    """Raise ValueError for wrong shapes, dtypes and devices; `like`, logits or LM head, decides the
    dtype of numbers.

    Ids are looked at inside the operators: see `checked_rows`.
    """
    columns = {
        "proximal_log_probs_T": proximal_log_probs_T,
        "behaviour_log_probs_T": behaviour_log_probs_T,
        "reference_log_probs_T": reference_log_probs_T,
    }
    check_integer("target_ids_T", target_ids_T)
    check_integer("sequence_ids_T", sequence_ids_T)
    others = {"sequence_ids_T": sequence_ids_T, "mask_T": mask_T, "advantages_T": advantages_T}
    for name, tensor in (others | columns).items():
        check_row_tensor(name, tensor, len(target_ids_T), target_ids_T.device)
    sequences = _sequences_of(target_ids_T, advantages_S, advantages_T)
    if settings.kl_coefficient > 0 and reference_log_probs_T is None:
        raise ValueError(
            f"kl_coefficient is {settings.kl_coefficient}, which needs reference_log_probs_T"
        )
    mask = (target_ids_T != IGNORED_TARGET) & (True if mask_T is None else mask_T.detach() != 0)
    dtype = accumulator_of(like)
    sequence_ids_T = torch.where(mask, column(sequence_ids_T, torch.int64), 0)
    ones_S = torch.ones(sequences, dtype=dtype, device=target_ids_T.device)
    return RowInputs(
        target_ids_T=torch.where(mask, column(target_ids_T, torch.int64), 0),
        sequence_ids_T=sequence_ids_T,
        advantages_S=None if advantages_S is None else column(advantages_S, dtype),
        advantages_T=None if advantages_T is None else column(advantages_T, dtype),
        scales_S=_scales(mask, sequence_ids_T, ones_S, token_count, sequence_count, settings),
        mask_T=mask.contiguous(),
        **{
            name: None if tensor is None else column(tensor, dtype)
            for name, tensor in columns.items()
        },
    )


def _sequences_of(
    target_ids_T: Tensor, advantages_S: Tensor | None, advantages_T: Tensor | None
) -> int:
    """How many sequences there may be: as many as advantages, or as rows where each has its own."""
    if (advantages_S is None) == (advantages_T is None):
        found = "neither" if advantages_S is None else "both"
        raise ValueError(f"{found} of advantages_S and advantages_T given; expected one of them")
    if advantages_S is None:
        return len(target_ids_T)
    check_row_tensor("advantages_S", advantages_S, advantages_S.numel(), target_ids_T.device)
    if len(target_ids_T) and not advantages_S.numel():
        raise ValueError(
            "advantages_S is empty; expected one advantage for each sequence of the "
            f"{len(target_ids_T)} rows"
        )
    return advantages_S.numel()


def _scales(
    mask_T: Tensor,
    sequence_ids_T: Tensor,
    ones_S: Tensor,
    token_count: Count,
    sequence_count: Count | None,
    settings: PolicyLossSettings,
) -> Tensor:
    """1 / denominator for one token of each sequence; a count of 0 (all masked) gives a loss of 0,
    not NaN."""
    if settings.normalisation == "token":
        return ones_S / count_tensor(token_count, "token_count", ones_S.device, ones_S.dtype)
    if sequence_count is None:
        raise ValueError(
            f"normalisation {settings.normalisation!r} needs sequence_count, the global number of "
            "sequences"
        )
    sequences = count_tensor(sequence_count, "sequence_count", ones_S.device, ones_S.dtype)
    if settings.fixed_length is not None:
        return ones_S / (sequences * settings.fixed_length)
    ids_T = _bounded(sequence_ids_T, len(ones_S))
    lengths_S = ones_S.new_zeros(len(ones_S) + 1).index_add(0, ids_T, mask_T.to(ones_S.dtype))[:-1]
    return ones_S / (lengths_S.clamp(min=1) * sequences)


def _bounded(sequence_ids_T: Tensor, sequences: int) -> Tensor:
    """Ids out of range become `sequences`, one past the last."""
    outside_T = (sequence_ids_T < 0) | (sequence_ids_T >= sequences)
    return torch.where(outside_T, sequences, sequence_ids_T)


def count_tensor(count: Count, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A denominator as a 0-dim tensor, at least 1; no synchronisation for a tensor, which is
    clamped on its device."""
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(count.shape)}; expected one number")
        return count.detach().to(device, dtype).reshape(()).clamp(min=1)
    if not 0 <= count < math.inf:
        raise ValueError(f"{name} is {count!r}; expected a count of 0 or more")
    return torch.full((), max(float(count), 1.0), dtype=dtype, device=device)


def check_integer(name: str, tensor: Tensor) -> None:
    """Ids are int32 or int64 vectors."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected [T], int64 "
            "or int32"
        )


def check_row_tensor(
    name: str, tensor: Tensor | None, rows: int, device: torch.device, other: str = "target_ids_T"
) -> None:
    """A per-row (or per-sequence) vector of the right length on the right device."""
    if tensor is None:
        return
    if tuple(tensor.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({rows},)")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where {other} is")


def check_matrix(name: str, tensor: Tensor, columns: int | None = None) -> None:
    """A plain two-dimensional floating-point tensor: not sharded, not empty."""
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor; gather it first (`.full_tensor()`, or FSDP's unshard)"
        )
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected two "
            "dimensions, floating point"
        )
    if tensor.shape[1] == 0 or (columns is not None and tensor.shape[1] != columns):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {columns or 'at least 1'} columns"
        )


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> None:
    """Hidden states [T, H] and LM head [V, H], [V] belong together; `names` are those the caller
    knows them by."""
    hidden_name, weight_name, bias_name = names
    check_matrix(hidden_name, hidden)
    if weight.numel() == 0:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}: an empty shard; gather the LM head "
            "first"
        )
    check_matrix(weight_name, weight, hidden.shape[1])
    if hidden.dtype != weight.dtype and not _is_autocast(hidden, weight):
        raise ValueError(
            f"{hidden_name} is {hidden.dtype} but {weight_name} is {weight.dtype}; expected one "
            "dtype"
        )
    check_device(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{bias_name} has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)"
            )
        check_device(bias_name, bias, hidden_name, hidden)


def products_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the LM head's products are taken in: as autocast would, where it is on."""
    if _is_autocast(hidden, weight):
        return torch.get_autocast_dtype(hidden.device.type)
    return weight.dtype


def _is_autocast(hidden: Tensor, weight: Tensor) -> bool:
    """Autocast leaves float64 alone."""
    return torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (
        hidden.dtype,
        weight.dtype,
    )


def check_projection(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_ids_T: Tensor,
    hidden_rows_T: Tensor | None = None,
) -> None:
    """Hidden states, LM head and targets belong together; so do, where rows share hidden states,
    the rows of these."""
    check_head(hidden_TH, weight_VH, bias_V, ("hidden_TH", "weight_VH", "bias_V"))
    if hidden_rows_T is None:
        _check_targets_of(target_ids_T, "hidden_TH", hidden_TH)
        return
    check_integer("hidden_rows_T", hidden_rows_T)
    check_device("hidden_rows_T", hidden_rows_T, "hidden_TH", hidden_TH)
    _check_targets_of(target_ids_T, "hidden_rows_T", hidden_rows_T)


def check_logits(logits_TV: Tensor, target_ids_T: Tensor) -> None:
    """Logits and targets belong together."""
    check_matrix("logits_TV", logits_TV)
    _check_targets_of(target_ids_T, "logits_TV", logits_TV)


def _check_targets_of(target_ids_T: Tensor, name: str, rows: Tensor) -> None:
    if tuple(target_ids_T.shape) != (rows.shape[0],):
        raise ValueError(
            f"target_ids_T has shape {tuple(target_ids_T.shape)}; expected ({rows.shape[0]},), one "
            f"per row of {name}"
        )
    check_device("target_ids_T", target_ids_T, name, rows)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Everything a loss is given lies on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}; expected {other.device}, where {other_name} is"
        )


def reads_values(tensor: Tensor) -> bool:
    """Whether ids may be looked at: not on a GPU, which would have to be waited for.

    Called inside the operators, where torch.compile does not look. On a CPU an id out of range is
    an error; elsewhere its row gets a NaN loss, which no training loop overlooks.
    """
    return tensor.device.type == "cpu"


def check_targets(target_ids_T: Tensor, mask_T: Tensor, vocabulary: int) -> None:
    """Where values may be read: ValueError for an unmasked id outside [0, V). Elsewhere the kernels
    say NaN."""
    if not reads_values(target_ids_T):
        return
    wrong_T = mask_T & ((target_ids_T < 0) | (target_ids_T >= vocabulary))
    if bool(wrong_T.any()):
        row = int(wrong_T.nonzero()[0])
        raise ValueError(
            f"target_ids_T[{row}] is {int(target_ids_T[row])}; expected an id in [0, {vocabulary}) "
            f"or {IGNORED_TARGET}"
        )


def checked_rows(rows: RowInputs, vocabulary: int) -> RowInputs:
    """`check_targets`, and the same for the sequence ids of unmasked rows: an error, or NaN for
    advantage and scale."""
    check_targets(rows.target_ids_T, rows.mask_T, vocabulary)
    ids_T, sequences = rows.sequence_ids_T, len(rows.scales_S)
    if not reads_values(ids_T):
        return replace(
            rows,
            sequence_ids_T=_bounded(ids_T, sequences),
            advantages_S=None if rows.advantages_S is None else _and_nan(rows.advantages_S),
            scales_S=_and_nan(rows.scales_S),
        )
    low, high = (int(ids_T.min()), int(ids_T.max())) if len(ids_T) else (0, 0)
    if low < 0 or (len(ids_T) and high >= sequences):
        expected = "an index into advantages_S" if rows.advantages_T is None else "one of the rows"
        raise ValueError(
            f"sequence_ids_T run from {low} to {high}; expected 0 to {sequences - 1}, {expected}"
        )
    return rows


def _and_nan(values_S: Tensor) -> Tensor:
    """One more value, for the rows whose sequence does not exist."""
    return torch.nn.functional.pad(values_S, (0, 1), value=math.nan)


def checked_live_rows(live_rows_L: Tensor, rows: int) -> Tensor:
    """int64 in rising order, so that all rows are the rows as they lie; where values may be read,
    ValueError unless they are distinct indices of rows."""
    check_integer("live_rows_L", live_rows_L)
    live_rows_L = column(live_rows_L, torch.int64).sort().values
    if reads_values(live_rows_L) and len(live_rows_L):
        low, high = int(live_rows_L[0]), int(live_rows_L[-1])
        if low < 0 or high >= rows or len(live_rows_L.unique()) < len(live_rows_L):
            raise ValueError(
                f"live_rows_L run from {low} to {high}; expected distinct rows from 0 to {rows - 1}"
            )
    return live_rows_L


def check_temperature(temperature: float) -> None:
    """A softmax temperature is finite and positive; sampling at temperature 0 has no log-probs."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature!r}; expected a finite number above 0")
