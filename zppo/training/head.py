"""The LM head of a causal LM: a matrix, perhaps a bias, a scale and a soft cap, if it is no more
than that.

Scale and cap have a name in the configuration, and whether the head is what they say is found by a
probe: its logits must be the model's own, for the hidden states as they are and for larger ones,
which a soft cap bends. A head that is more goes through the model's own logits, at the price of
logits for all positions.

Shape legend: B rows, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zppo.errors import UserError
from zppo.training.ranks import whole

PROBE_TOKENS = 8
LARGE_LOGIT = 120.0
"""So large are the logits of the second probe, or four times the soft cap: near 0 a cap is the
identity."""
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What configurations call the factor of the logits. Granite divides by `logits_scaling`,
HyperCLOVA X multiplies with it, so both ways are tried."""


@dataclass(frozen=True)
class Head:
    """Logits are `cap(logit_scale * (hidden @ weight_VH.T + bias_V))` with
    cap(x) = soft_cap * tanh(x / soft_cap), or x where `soft_cap` is None.

    The weights are read from the model's own layer each time: of a sharded model it holds whole
    ones within a pass, and shares outside, which are gathered. `unsampled_V` is 0, and -inf for the
    tokens that no response may hold: as a bias it takes them out of every softmax.
    """

    layer: Any
    soft_cap: float | None = None
    logit_scale: float = 1.0
    unsampled_V: Tensor | None = None

    @property
    def weight_VH(self) -> Tensor:
        return whole(self.layer.weight)

    @property
    def bias_V(self) -> Tensor | None:
        bias_V = getattr(self.layer, "bias", None)
        if bias_V is None:
            return self.unsampled_V
        bias_V = whole(bias_V)
        return bias_V if self.unsampled_V is None else bias_V + self.unsampled_V

    @property
    def map(self) -> dict[str, Any]:
        """Scale and cap as the kernels have them."""
        return {"logit_scale": self.logit_scale, "soft_cap": self.soft_cap}

    @property
    def plain(self) -> bool:
        """Whether there is neither scale nor cap."""
        return self.soft_cap is None and self.logit_scale == 1.0

    def logits(self, hidden_BLH: Tensor) -> Tensor:
        """Logits in float32, for the probe."""
        logits_BLV = nn.functional.linear(hidden_BLH, self.weight_VH, self.bias_V).float()
        logits_BLV = self.logit_scale * logits_BLV
        if self.soft_cap is None:
            return logits_BLV
        return self.soft_cap * torch.tanh(logits_BLV / self.soft_cap)


def trunk(model: Any) -> Any:
    """The part of a causal LM that ends where its head begins; the model itself if it has none."""
    return model.get_decoder() if model.base_model is model else model.base_model


def hidden_states(model: Any, **inputs: Tensor) -> Tensor:
    """The hidden states [B, L, H] that the head reads, of a model whose head is one."""
    hidden: Tensor = trunk(model)(**inputs, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def probe_head(model: Any, where: str) -> Head | None:
    """The head of a transformers causal LM, or None if its logits are not those of a `Head`.

    Raises UserError, naming the setting `where`, for logits that are not finite.
    """
    embedding = model.get_output_embeddings()
    weight_VH: Tensor | None = getattr(embedding, "weight", None)
    if weight_VH is None or weight_VH.dim() != 2:
        return None
    ids_BL = torch.arange(PROBE_TOKENS, device=weight_VH.device).remainder(weight_VH.shape[0])[None]
    logits = model(input_ids=ids_BL, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise UserError(f"{where}: the model's logits are not finite, so its weights are damaged")
    output = trunk(model)(input_ids=ids_BL, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != weight_VH.shape[1]:
        return None
    heads = _candidates(model, embedding)
    found = (head for head in heads if _fits(head, hidden, logits))
    return next((head for head in found if _fits_large(head, model, ids_BL, hidden)), None)


def _candidates(model: Any, layer: Any) -> Iterator[Head]:
    """The heads that the configuration may speak of, the plain one first."""
    config = model.config.get_text_config()
    soft_cap = getattr(config, "final_logit_softcapping", None) or None
    factors = [getattr(config, name, None) for name in SCALES]
    scales = [1.0]
    for factor in factors:
        if isinstance(factor, (int, float)) and factor > 0 and factor != 1:
            scales += [float(factor), 1.0 / factor]
    for scale in scales:
        yield Head(layer, None if soft_cap is None else float(soft_cap), scale)


def _fits(head: Head, hidden_BLH: Tensor, logits_BLV: Tensor) -> bool:
    """Whether these are the head's logits, as far as the model's dtype tells."""
    tolerance = 1e-3 if head.plain else max(1e-3, 4 * torch.finfo(logits_BLV.dtype).eps)
    largest = float(logits_BLV.abs().max())
    return torch.allclose(
        head.logits(hidden_BLH), logits_BLV.float(), rtol=tolerance, atol=tolerance * largest
    )


def _fits_large(head: Head, model: Any, ids_BL: Tensor, hidden_BLH: Tensor) -> bool:
    """The same for larger hidden states, where a soft cap shows."""
    linear = Head(head.layer, None, head.logit_scale)
    largest = float(linear.logits(hidden_BLH).abs().max())
    factor = max(LARGE_LOGIT, 4 * (head.soft_cap or 0.0)) / max(largest, 1e-6)
    with _scaled_output(trunk(model), factor):
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    return _fits(head, hidden_BLH * factor, logits_BLV)


@contextmanager
def _scaled_output(module: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the last hidden state that `module` gives."""

    def scale(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"] * factor
        return output

    handle = module.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
