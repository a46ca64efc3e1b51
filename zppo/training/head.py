"""The LM head of a causal LM: a matrix and perhaps a bias, if it is no more than that.

A head that is more (soft caps, scaled logits) is found by a probe; then only the model's own logits
are right, at the price of logits for all positions.

Shape legend: B rows, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zppo.errors import UserError

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Head:
    """Logits are `hidden @ weight_VH.T + bias_V`."""

    weight_VH: Tensor
    bias_V: Tensor | None


def trunk(model: Any) -> Any:
    """The part of a causal LM that ends where its head begins; the model itself if it has none."""
    return model.get_decoder() if model.base_model is model else model.base_model


def hidden_states(model: Any, **inputs: Tensor) -> Tensor:
    """The hidden states [B, L, H] that the head reads, of a model whose head is one."""
    hidden: Tensor = trunk(model)(**inputs, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def probe_head(model: Any, where: str) -> Head | None:
    """The head of a transformers causal LM, or None if its logits are more than hidden states times
    a matrix.

    Raises UserError, naming the setting `where`, for logits that are not finite.
    """
    embedding = model.get_output_embeddings()
    weight_VH: Tensor | None = getattr(embedding, "weight", None)
    if weight_VH is None or weight_VH.dim() != 2:
        return None
    if getattr(model.config, "final_logit_softcapping", None):
        return None  # near 0 a soft cap is the identity, so the probe might not see it
    ids_BL = torch.arange(PROBE_TOKENS, device=weight_VH.device).remainder(weight_VH.shape[0])[None]
    logits = model(input_ids=ids_BL, use_cache=False).logits.float()
    if not bool(logits.isfinite().all()):
        raise UserError(f"{where}: the model's logits are not finite, so its weights are damaged")
    output = trunk(model)(input_ids=ids_BL, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != weight_VH.shape[1]:
        return None
    head = Head(weight_VH, getattr(embedding, "bias", None))
    own = nn.functional.linear(hidden, head.weight_VH, head.bias_V).float()
    return (
        head
        if torch.allclose(own, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
        else None
    )
