"""Attention in long rows that are trees: branch by branch, without a mask.

A branch is a run of positions that see the same positions before the run, and of the run what
stands before them. A row has at most one a rollout, the first with the prompt, and one of padding.

On a CPU, attention to what stands before a branch and to the branch itself is a call each of
torch's fused kernel, full to the first and causal to the second. The two are merged by the
logarithms of the sums that their softmaxes divide by, and with the merged ones the kernel's
backward pass gives each part's own gradient. So a branch costs what it would cost alone, less what
its prompt's positions would. The kernel has float16, bfloat16, float32 and float64, values as wide
as keys, and no caps or sinks.

On other devices a branch is one call of torch's attention, to the keys of both, causal at its lower
right end: CUDA's flash and memory-efficient kernels make no mask of that. It needs them side by
side, for each query head. Kept, these copies would be keys and values of a prompt once for each of
its branches and layers: as many as rollouts in rows of their own have, but more than a pass of as
many positions may keep. So attention to a branch is computed again in the backward pass, one at a
time: the copies take 2 * H * (N + own) * D numbers then, and kept are queries, keys and values of
the row alone. Written for GPUs, never run on one; on a CPU, where tests hold it to the other way,
torch makes a mask for each branch.

Shape legend: B rows, H query heads, K key-value heads, L positions, D head width, N positions that
a branch sees before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_known = WeakTensorKeyDictionary()


class Branch(NamedTuple):
    """The positions `own` of a row, and those before them that all of them see, [N]."""

    row: int
    own: slice
    before_N: Tensor


def branches(ends_BL: Tensor) -> list[Branch]:
    """The branches of rows where i sees j if j <= i < ends[j], in the order of their positions, on
    the device of `ends_BL`. A row's padding is one of them."""
    found = []
    for row, ends_L in enumerate(ends_BL.cpu()):
        begin = 0
        for end in ends_L.unique().tolist():
            before_N = (ends_L[:begin] > begin).nonzero()[:, 0]
            found.append(Branch(row, slice(begin, end), before_N.to(ends_BL.device)))
            begin = end
    return found


def branches_of(mask_B11L: Tensor) -> list[Branch]:
    """Those of `zppo.training.layout.tree_mask`, found once for all layers of a pass: the device is
    waited for."""
    if mask_B11L not in _known:
        _known[mask_B11L] = branches(mask_B11L[:, 0, 0])
    found: list[Branch] = _known[mask_B11L]
    return found


def tree_attention(
    query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, parts: list[Branch], scale: float
) -> Tensor:
    """Attention [B, H, L, D] of rows that are trees, of which `parts` are the branches."""
    attend = in_two_calls if query_BHLD.device.type == "cpu" else side_by_side
    return attend(query_BHLD, key_BKLD, value_BKLD, parts, scale)


def in_two_calls(
    query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, parts: list[Branch], scale: float
) -> Tensor:
    """`tree_attention` by torch's fused kernel for CPUs."""
    heads = query_BHLD.shape[1] // key_BKLD.shape[1]
    output_BHLD: Tensor = _TreeAttention.apply(
        query_BHLD,
        key_BKLD.repeat_interleave(heads, 1),
        value_BKLD.repeat_interleave(heads, 1),
        parts,
        scale,
    )
    return output_BHLD


def side_by_side(
    query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, parts: list[Branch], scale: float
) -> Tensor:
    """`tree_attention` by torch's attention for any device."""
    rows, _, length, _ = query_BHLD.shape
    # Rows one behind the other, so that their branches follow each other too.
    lengths = [part.own.stop - part.own.start for part in parts]
    queries = query_BHLD.transpose(0, 1).flatten(1, 2).split(lengths, 1)
    found = [
        checkpoint(
            _one_branch,
            *(query_HMD, key_BKLD, value_BKLD, part, scale),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for query_HMD, part in zip(queries, parts, strict=True)
    ]
    return torch.cat(found, 1).unflatten(1, (rows, length)).transpose(0, 1)


def _one_branch(
    query_HMD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, part: Branch, scale: float
) -> Tensor:
    """Attention of a branch of M positions to itself and to what stands before it [H, M, D]."""
    own_M = torch.arange(part.own.start, part.own.stop, device=query_HMD.device)
    places = torch.cat([part.before_N, own_M])
    heads = len(query_HMD) // key_BKLD.shape[1]
    key, value = (
        states[part.row].index_select(1, places).repeat_interleave(heads, 0)[None]
        for states in (key_BKLD, value_BKLD)
    )
    mask = causal_lower_right(len(own_M), len(places))
    return scaled_dot_product_attention(query_HMD[None], key, value, attn_mask=mask, scale=scale)[0]


class _TreeAttention(torch.autograd.Function):
    """Keys and values have as many heads as queries here."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHLD: Tensor,
        key_BHLD: Tensor,
        value_BHLD: Tensor,
        parts: list[Branch],
        scale: float,
    ) -> Tensor:
        output_BHLD = torch.empty_like(query_BHLD)
        sums_BHL = query_BHLD.new_empty(query_BHLD.shape[:3], dtype=_wide(query_BHLD))
        for row, own, before_N in parts:
            query, key, value = (
                states[row : row + 1] for states in (query_BHLD, key_BHLD, value_BHLD)
            )
            query = query[:, :, own]
            found, sums = _forward(query, key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            if len(before_N):
                other, other_sums = _forward(
                    query, key[:, :, before_N], value[:, :, before_N], 0.0, False, scale=scale
                )
                both = torch.logaddexp(sums, other_sums)
                found = found * (sums - both).exp()[..., None]
                found = found + other * (other_sums - both).exp()[..., None]
                sums = both
            output_BHLD[row, :, own], sums_BHL[row, :, own] = found[0], sums[0]
        ctx.save_for_backward(query_BHLD, key_BHLD, value_BHLD, output_BHLD, sums_BHL)
        ctx.parts, ctx.scale = parts, scale
        return output_BHLD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *states, output_BHLD, sums_BHL = ctx.saved_tensors
        # A prompt's keys and values gather the gradients of all its branches.
        totals = [torch.zeros_like(one, dtype=_wide(one)) for one in states]
        for row, own, before_N in ctx.parts:
            query, key, value, gradient, output, sums = (
                one[row : row + 1] for one in (*states, gradients[0], output_BHLD, sums_BHL)
            )
            query, gradient, output, sums = (
                one[:, :, own] for one in (query, gradient, output, sums)
            )
            for places, causal in ((own, True), (before_N, False)):
                if isinstance(places, Tensor) and not len(places):
                    continue
                parts = _backward(
                    gradient,
                    query,
                    key[:, :, places],
                    value[:, :, places],
                    output,
                    sums,
                    0.0,
                    causal,
                    scale=ctx.scale,
                )
                for total, part, at in zip(totals, parts, (own, places, places), strict=True):
                    total[row, :, at] += part[0]
        found = [total.to(one.dtype) for total, one in zip(totals, states, strict=True)]
        return *found, None, None


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
