"""Attention of the trainer: on a CPU matrix products and a softmax, with the weights computed again
in the backward pass, and in long rows that are trees branch by branch (`zppo.training.trees`).

torch's fused kernel for CPUs saves memory that short rows do not need: at 265 positions in bfloat16
it takes 15.6 ms a layer where this takes 8, at 90 positions 3.6 ms where this takes 1.2. Rows
longer than `WIDEST`, other devices and everything that transformers' own `sdpa` may do on top go to
that function unchanged.

Invariant: no scores or weights (L * L a head) are kept between forward and backward pass; they are
masked and normalised in float32.

Shape legend: B rows, H query heads, K key-value heads, G = H / K query heads of each, L positions,
D head width of queries and keys, W of values (narrower in latent attention), X = G * L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from zppo.training.trees import branches_of, tree_attention

NAME = "zppo_products"
SDPA_EXTRAS = ("softcap", "s_aux", "position_bias", "cache")
"""What some architectures add to attention; transformers' function is asked for those."""
WIDEST = 1024
"""Longest row. The scores of one layer take 4 * L * L bytes a head and row."""


def adopt(model: Any) -> None:
    """Let a model that uses transformers' `sdpa` use this; another one is left as it is. One that
    caps its scores uses transformers' `eager`, because `sdpa` leaves the cap out. One that finds
    by an index which keys a token sees keeps its `sdpa`: it puts them into the mask for no other
    attention than transformers' own two."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    elif model.config._attn_implementation == "sdpa" and not _is_indexed(model):
        AttentionInterface.register(NAME, products_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _is_indexed(model: nn.Module) -> bool:
    return any(getattr(module, "indexer", None) is not None for module in model.modules())


def products_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLW: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `attention_mask` is None (causal), boolean or
    additive, or whole numbers, the ends of a tree's branches (`zppo.training.layout.tree_mask`).
    Returns [B, L, H, W].

    Raises NotImplementedError for a tree in a layer that does more than attention.
    """
    more = any(value is not None for name, value in extras.items() if name in SDPA_EXTRAS)
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        if more or dropout:
            raise NotImplementedError("a tree's attention has no caps, sinks, biases or dropout")
        parts = branches_of(attention_mask)
        output = tree_attention(query_BHLD, key_BKLD, value_BKLW, parts, scale)
        return output.transpose(1, 2).contiguous(), None
    length = query_BHLD.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = (
        query_BHLD.device.type == "cpu"
        and key_BKLD.shape[2] == length <= WIDEST
        and not dropout
        and (causal if attention_mask is None else attention_mask.shape[1] == 1)
    )
    if more or not plain:
        return sdpa_attention_forward(
            module,
            query_BHLD,
            key_BKLD,
            value_BKLW,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            **extras,
        )
    bias = _bias(attention_mask, length, query_BHLD)
    output_BHLW: Tensor = _Attention.apply(query_BHLD, key_BKLD, value_BKLW, bias, scale)
    return output_BHLW.transpose(1, 2).contiguous(), None


def _bias(mask: Tensor | None, length: int, like: Tensor) -> Tensor:
    """The mask as numbers to add to the scores, [B or 1, 1, L, L] in the dtype of `like`."""
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~mask, torch.finfo(like.dtype).min
    )


def _weights(query_BKXD: Tensor, key_BKLD: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax of the scores, float32 [B, K, G * L, L]."""
    scores_BKXL = torch.matmul(query_BKXD, key_BKLD.transpose(2, 3)).float()
    length = key_BKLD.shape[2]
    scores_BKXL.unflatten(2, (-1, length)).mul_(scale).add_(bias[:, :, None])
    return scores_BKXL.softmax(-1)


class _Attention(torch.autograd.Function):
    """The G query heads of a key-value head lie one behind the other, so that keys and values are
    not repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHLD: Tensor,
        key_BKLD: Tensor,
        value_BKLW: Tensor,
        bias: Tensor,
        scale: float,
    ) -> Tensor:
        query_BKXD = _by_key_head(query_BHLD, key_BKLD.shape[1])
        key_BKLD, value_BKLW = key_BKLD.contiguous(), value_BKLW.contiguous()
        ctx.save_for_backward(query_BKXD, key_BKLD, value_BKLW, bias)
        ctx.scale = scale
        weights_BKXL = _weights(query_BKXD, key_BKLD, bias, scale).to(value_BKLW.dtype)
        return _by_query_head(torch.matmul(weights_BKXL, value_BKLW), query_BHLD.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_BKXD, key_BKLD, value_BKLW, bias = ctx.saved_tensors
        gradient_BKXW = _by_key_head(gradients[0], key_BKLD.shape[1])
        weights_BKXL = _weights(query_BKXD, key_BKLD, bias, ctx.scale)
        half_BKXL = weights_BKXL.to(value_BKLW.dtype)
        value_gradient = torch.matmul(half_BKXL.transpose(2, 3), gradient_BKXW)
        scores_BKXL = torch.matmul(gradient_BKXW, value_BKLW.transpose(2, 3)).float()
        mean_BKX1 = torch.linalg.vecdot(scores_BKXL, weights_BKXL)[..., None]
        scores_BKXL.sub_(mean_BKX1).mul_(weights_BKXL).mul_(ctx.scale)
        half_BKXL = scores_BKXL.to(value_BKLW.dtype)
        query_gradient = _by_query_head(torch.matmul(half_BKXL, key_BKLD), gradients[0].shape[1])
        key_gradient = torch.matmul(half_BKXL.transpose(2, 3), query_BKXD)
        return query_gradient, key_gradient, value_gradient, None, None


def _by_key_head(states_BHLD: Tensor, key_heads: int) -> Tensor:
    """[B, H, L, D] -> [B, K, G * L, D]."""
    return states_BHLD.contiguous().unflatten(1, (key_heads, -1)).flatten(2, 3)


def _by_query_head(states_BKXD: Tensor, heads: int) -> Tensor:
    """[B, K, G * L, D] -> [B, H, L, D]."""
    rows, _, _, width = states_BKXD.shape
    return states_BKXD.view(rows, heads, -1, width)
