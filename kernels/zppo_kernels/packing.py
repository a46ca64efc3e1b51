"""Packed sequences: a flat [T] axis with int32 `cu_seqlens` of length B + 1, and splits that
balance tokens.

Invariant: sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; every split below is a partition
of the sequences.

Shapes: B sequences, L padded length, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._partition import partition_labels


def cu_seqlens_of(lengths: Sequence[int] | Tensor) -> Tensor:
    """Lengths [B] -> cumulative lengths int32 [B + 1] on the same device, starting with 0."""
    lengths_B = torch.as_tensor(lengths)
    ends_B = lengths_B.long().cumsum(0)
    return torch.cat([ends_B.new_zeros(1), ends_B]).to(torch.int32)


def sequence_ids_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """Cumulative lengths [B + 1] -> for each of `total` packed rows the sequence that owns it,
    int64 [T]; no host sync.
    """
    lengths_B = cu_seqlens.long().diff()
    ids_B = torch.arange(len(lengths_B), device=cu_seqlens.device)
    return torch.repeat_interleave(ids_B, lengths_B, output_size=total)


def pack(padded_BL: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Padded [B, L, ...] -> packed [T, ...]; padding is on the right; differentiable; no host
    sync."""
    rows_T, columns_T = _coordinates(cu_seqlens, total)
    return padded_BL[rows_T, columns_T]


def unpack(packed_T: Tensor, cu_seqlens: Tensor, length: int, fill: float = 0) -> Tensor:
    """Packed [T, ...] -> padded [B, length, ...] with `fill` on the right; differentiable; no host
    sync."""
    rows_T, columns_T = _coordinates(cu_seqlens, len(packed_T))
    padded_BL = packed_T.new_full((len(cu_seqlens) - 1, length, *packed_T.shape[1:]), fill)
    return padded_BL.index_put((rows_T, columns_T), packed_T)


def _coordinates(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    rows_T = sequence_ids_of(cu_seqlens, total)
    return rows_T, torch.arange(total, device=cu_seqlens.device) - cu_seqlens.long()[rows_T]


def balanced_partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of the sequences split into `parts` lists of nearly equal token sums, heaviest list
    first.

    Longest first into the lightest list, then swaps while they lower the heaviest: never more than
    4/3 of the optimum.
    """
    if parts < 1:
        raise ValueError(f"parts is {parts}; expected at least 1")
    values = _lengths(lengths)
    labels = partition_labels(values, parts)
    loads = np.bincount(labels, weights=values, minlength=parts)
    order = np.argsort(-loads, kind="stable")
    return [np.flatnonzero(labels == part).tolist() for part in order]


def micro_batches(
    lengths: Sequence[int], max_tokens: int, *, count_multiple: int = 1
) -> list[list[int]]:
    """Indices of the sequences in micro-batches of at most `max_tokens` tokens, as few and as equal
    as can be found.

    `count_multiple` (the number of ranks, say) makes the number of micro-batches a multiple of it,
    some perhaps empty.
    """
    values = _lengths(lengths)
    if len(values) and values.max() > max_tokens:
        longest = int(values.argmax())
        raise ValueError(
            f"sequence {longest} has {int(values[longest])} tokens; expected at most max_tokens = "
            f"{max_tokens}"
        )
    if not len(values):
        return []
    count = max(1, -(-int(values.sum()) // max_tokens))
    count = -(-count // count_multiple) * count_multiple
    while True:
        batches = balanced_partition(lengths, count)
        if int(values[batches[0]].sum()) <= max_tokens:
            return batches if count_multiple > 1 else [batch for batch in batches if batch]
        count += count_multiple


def _lengths(lengths: Sequence[int]) -> np.ndarray:
    values = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(values) and values.min() < 0:
        raise ValueError(
            f"sequence {int(values.argmin())} has length {int(values.min())}; expected 0 or more"
        )
    return values
