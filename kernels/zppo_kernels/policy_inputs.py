"""Checks and completes the row inputs of the policy loss, so that every path below may trust them.

Invariant: after `prepare_rows` all tensors are on one device, per-row statistics are float32, ids
int64, the mask is bool, targets of masked rows are 0 or more, and `scales_S` holds the whole
normalisation.

Shapes: T rows, H hidden, V vocabulary, S sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy_reference import PolicyRows
from .settings import PolicyLossSettings

IGNORED_TARGET = -100
Count = int | float | Tensor


def prepare_rows(
    target_ids_T: Tensor,
    *,
    sequence_ids_T: Tensor,
    advantages_S: Tensor,
    proximal_log_probs_T: Tensor,
    behaviour_log_probs_T: Tensor | None,
    reference_log_probs_T: Tensor | None,
    mask_T: Tensor | None,
    token_count: Count,
    sequence_count: Count | None,
    settings: PolicyLossSettings,
) -> PolicyRows:
    """Raise ValueError for wrong shapes, dtypes, devices and ids; return rows that need no further
    check."""
    rows = len(target_ids_T)
    optional = {
        "behaviour_log_probs_T": behaviour_log_probs_T,
        "reference_log_probs_T": reference_log_probs_T,
    }
    required = {"sequence_ids_T": sequence_ids_T, "proximal_log_probs_T": proximal_log_probs_T}
    check_integer("target_ids_T", target_ids_T)
    check_integer("sequence_ids_T", sequence_ids_T)
    for name, tensor in (required | optional | {"mask_T": mask_T}).items():
        check_row_tensor(name, tensor, rows, target_ids_T.device)
    check_row_tensor("advantages_S", advantages_S, advantages_S.numel(), target_ids_T.device)
    if settings.kl_coefficient > 0 and reference_log_probs_T is None:
        raise ValueError(
            f"kl_coefficient is {settings.kl_coefficient}, which needs reference_log_probs_T"
        )
    mask = (target_ids_T != IGNORED_TARGET) & (True if mask_T is None else mask_T.detach() != 0)
    sequence_ids_T = sequence_ids_T.long()
    return PolicyRows(
        target_ids_T=torch.where(mask, target_ids_T.long(), 0),
        sequence_ids_T=sequence_ids_T,
        advantages_S=_statistic(advantages_S),
        scales_S=_scales(mask, sequence_ids_T, advantages_S, token_count, sequence_count, settings),
        proximal_log_probs_T=_statistic(proximal_log_probs_T),
        mask_T=mask,
        behaviour_log_probs_T=None
        if behaviour_log_probs_T is None
        else _statistic(behaviour_log_probs_T),
        reference_log_probs_T=None
        if reference_log_probs_T is None
        else _statistic(reference_log_probs_T),
    )


def _statistic(tensor: Tensor) -> Tensor:
    """Constants of the loss: detached, float32 (float64 is kept, for the oracle), contiguous."""
    detached = tensor.detach()
    return (detached if detached.dtype == torch.float64 else detached.float()).contiguous()


def _scales(
    mask_T: Tensor,
    sequence_ids_T: Tensor,
    advantages_S: Tensor,
    token_count: Count,
    sequence_count: Count | None,
    settings: PolicyLossSettings,
) -> Tensor:
    """1 / denominator for one token of each sequence; a count of 0 (all masked) gives a loss of 0,
    not NaN."""
    ones_S = torch.ones_like(
        advantages_S, dtype=torch.float64 if advantages_S.dtype == torch.float64 else torch.float32
    )
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
    lengths_S = torch.zeros_like(ones_S).index_add(0, sequence_ids_T, mask_T.to(ones_S.dtype))
    return ones_S / (lengths_S.clamp(min=1) * sequences)


def count_tensor(count: Count, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A denominator as a 0-dim tensor, at least 1; no synchronisation for a tensor, which is
    clamped on its device."""
    if isinstance(count, Tensor):
        return count.detach().to(device, dtype).clamp(min=1)
    if not count >= 0:
        raise ValueError(f"{name} is {count!r}; expected a count of 0 or more")
    return torch.full((), max(float(count), 1.0), dtype=dtype, device=device)


def check_integer(name: str, tensor: Tensor) -> None:
    """Ids are int32 or int64 vectors."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected [T], int64 "
            "or int32"
        )


def check_row_tensor(name: str, tensor: Tensor | None, rows: int, device: torch.device) -> None:
    """A per-row (or per-sequence) vector of the right length on the right device."""
    if tensor is None:
        return
    if tuple(tensor.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({rows},)")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where target_ids_T is")


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


def check_projection(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_ids_T: Tensor
) -> None:
    """Hidden states, LM head and targets belong together."""
    check_matrix("hidden_TH", hidden_TH)
    if weight_VH.numel() == 0:
        raise ValueError(
            f"weight_VH has shape {tuple(weight_VH.shape)}: an empty shard; gather the LM head "
            "first"
        )
    check_matrix("weight_VH", weight_VH, hidden_TH.shape[1])
    if hidden_TH.dtype != weight_VH.dtype:
        raise ValueError(
            f"hidden_TH is {hidden_TH.dtype} but weight_VH is {weight_VH.dtype}; expected one dtype"
        )
    if bias_V is not None and tuple(bias_V.shape) != (weight_VH.shape[0],):
        raise ValueError(
            f"bias_V has shape {tuple(bias_V.shape)}; expected ({weight_VH.shape[0]},)"
        )
    _check_together(hidden_TH, weight_VH, target_ids_T, "hidden_TH")


def check_logits(logits_TV: Tensor, target_ids_T: Tensor) -> None:
    """Logits and targets belong together."""
    check_matrix("logits_TV", logits_TV)
    _check_together(logits_TV, logits_TV, target_ids_T, "logits_TV")


def _check_together(rows: Tensor, other: Tensor, target_ids_T: Tensor, name: str) -> None:
    if tuple(target_ids_T.shape) != (rows.shape[0],):
        raise ValueError(
            f"target_ids_T has shape {tuple(target_ids_T.shape)}; expected ({rows.shape[0]},), one "
            f"per row of {name}"
        )
    if not rows.device == other.device == target_ids_T.device:
        raise ValueError(
            f"tensors are on {rows.device}, {other.device} and {target_ids_T.device}; expected one "
            "device"
        )


def check_targets(target_ids_T: Tensor, mask_T: Tensor, vocabulary: int) -> None:
    """Called inside the operators, where torch.compile does not look: on the CPU an unmasked id
    outside [0, V) is an error.

    A GPU would have to wait for the answer: there the kernels give the row a NaN loss, which no
    training loop overlooks.
    """
    if target_ids_T.device.type != "cpu":
        return
    wrong_T = mask_T & ((target_ids_T < 0) | (target_ids_T >= vocabulary))
    if bool(wrong_T.any()):
        row = int(wrong_T.nonzero()[0])
        raise ValueError(
            f"target_ids_T[{row}] is {int(target_ids_T[row])}; expected an id in [0, {vocabulary}) "
            f"or {IGNORED_TARGET}"
        )


def check_row_ids(rows: PolicyRows, vocabulary: int) -> None:
    """`check_targets`, and the same for the sequence ids."""
    check_targets(rows.target_ids_T, rows.mask_T, vocabulary)
    ids_T, sequences = rows.sequence_ids_T, rows.advantages_S.numel()
    if ids_T.device.type != "cpu" or not len(ids_T):
        return
    low, high = int(ids_T.min()), int(ids_T.max())
    if low < 0 or high >= sequences:
        raise ValueError(
            f"sequence_ids_T run from {low} to {high}; expected 0 to {sequences - 1}, an index "
            "into advantages_S"
        )


def check_temperature(temperature: float) -> None:
    """A softmax temperature is finite and positive; sampling at temperature 0 has no log-probs."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature!r}; expected a finite number above 0")
