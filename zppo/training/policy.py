"""The student inside the trainer: a causal LM of Hugging Face, cut between its last hidden state and its LM head.

Only the rows that predict response tokens are gathered before the head, so prompts and padding never reach it. Padding
stands on the right and attention is causal, so a real token cannot see it: ordinary rows need no attention mask and no
position ids, and the fast causal attention path stays open. Rows with several rollouts behind one prompt need both; a
probe finds out whether the model computes them as it would compute the rollouts alone (no sliding windows, no
recurrent layers).

A head that is more than a matrix and a bias (soft caps, scaled logits) is found by a probe and goes through the model's
own logits instead: right for every model, at the price of logits for all positions.

Shape legend: B rows, L padded positions, R response tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zppo.errors import UserError
from zppo.training.layout import PROMPT, MicroBatch, attention_mask
from zppo_kernels import (
    PolicyLossOutput,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)


class Policy:
    """Log-probs and losses of micro-batches under the current weights."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers causal LM; it is put into evaluation mode, because dropout would bend the ratio."""
        self.model = model.eval()
        head = model.get_output_embeddings()
        self._weight_VH: Tensor | None = getattr(head, "weight", None)
        self._bias_V: Tensor | None = getattr(head, "bias", None)
        self.plain_head = self._probe_head()
        self.shares_prompts = self._probe_sharing()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def recompute_layers(self) -> None:
        """Keep only the inputs of the layers and recompute the rest in the backward pass (gradient checkpointing).

        transformers does so in training mode only; the layers alone are put into it, so that dropout stays off.
        """
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
                # A few architectures apply dropout in the layer itself, with a rate kept here.
                if isinstance(getattr(layer, "dropout", None), float):
                    setattr(layer, "dropout", 0.0)  # noqa: B010 - typed as a module, which it is not

    @torch.no_grad()
    def log_probs(self, batch: MicroBatch, target_ids_R: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, float32 [R] each."""
        if self._weight_VH is None or not self.plain_head:
            return token_log_probs_from_logits(self._logits(batch), target_ids_R, temperature=temperature)
        return token_log_probs(
            self._hidden(batch), self._weight_VH, target_ids_R, temperature=temperature, bias_V=self._bias_V
        )

    def loss(self, batch: MicroBatch, target_ids_R: Tensor, **arguments: Any) -> PolicyLossOutput:
        """Policy loss of the micro-batch; `arguments` are those of `zppo_kernels.policy_loss_from_hidden`."""
        if self._weight_VH is None or not self.plain_head:
            return policy_loss_from_logits(self._logits(batch), target_ids_R, **arguments)
        return policy_loss_from_hidden(
            self._hidden(batch), self._weight_VH, target_ids_R, bias_V=self._bias_V, **arguments
        )

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states that predict the response tokens [R, H]."""
        return self._hidden_states(**self._inputs(batch)).flatten(0, 1).index_select(0, batch.rows_R)

    def _logits(self, batch: MicroBatch) -> Tensor:
        """The model's own logits at the same rows [R, V]."""
        logits_BLV = self.model(**self._inputs(batch), use_cache=False).logits
        return logits_BLV.flatten(0, 1).index_select(0, batch.rows_R)

    def _hidden_states(self, **inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _inputs(self, batch: MicroBatch) -> dict[str, Tensor]:
        if batch.segments_BL is None or batch.positions_BL is None:
            return {"input_ids": batch.input_ids_BL}
        return {
            "input_ids": batch.input_ids_BL,
            "position_ids": batch.positions_BL,
            "attention_mask": attention_mask(batch.segments_BL, self.model.dtype),
        }

    @torch.no_grad()
    def _probe_head(self) -> bool:
        """Say whether hidden states times head (plus bias) are the model's logits. Raises UserError for NaN logits."""
        if self._weight_VH is None or self._weight_VH.dim() != 2:
            return False
        if getattr(self.model.config, "final_logit_softcapping", None):
            return False  # near 0 a soft cap is the identity, so the probe might not see it
        input_ids_BL = torch.arange(8, device=self.device).remainder(self._weight_VH.shape[0])[None]
        logits = self.model(input_ids=input_ids_BL, use_cache=False).logits.float()
        hidden = self._hidden_states(input_ids=input_ids_BL)
        if hidden.shape[-1] != self._weight_VH.shape[1]:
            return False
        if not bool(logits.isfinite().all()):
            raise UserError("student.model: the model's logits are not finite, so its weights are damaged")
        own = nn.functional.linear(hidden, self._weight_VH, self._bias_V).float()
        return bool(torch.allclose(own, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())))

    @torch.no_grad()
    def _probe_sharing(self) -> bool:
        """Say whether two rollouts behind one prompt get the hidden states that they get one by one."""
        config = self.model.config
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            return False  # a window is longer than a probe
        if config._attn_implementation not in ("sdpa", "eager"):
            return False
        ids = torch.arange(12, device=self.device).remainder(config.get_text_config().vocab_size)
        alone = [ids[:8], torch.cat([ids[:4], ids[8:]])]
        expected = torch.cat([self._hidden_states(input_ids=row[None])[0, 4:] for row in alone])
        positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7], device=self.device)
        segments = torch.tensor([PROMPT] * 4 + [1] * 4 + [2] * 4, device=self.device)
        mask = attention_mask(segments[None], self.model.dtype)
        try:
            found = self._hidden_states(input_ids=ids[None], position_ids=positions[None], attention_mask=mask)[0, 4:]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # a model that takes no such mask
        tolerance = (1e-4 if self.model.dtype == torch.float32 else 5e-2) * float(expected.abs().max())
        return bool(torch.allclose(found.float(), expected.float(), rtol=0.0, atol=tolerance))
