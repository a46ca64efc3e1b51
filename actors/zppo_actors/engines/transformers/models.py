"""Loading a model folder for sampling, and the proof that our cache computes what the model
computes without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from zppo.errors import UserError
from zppo_actors.engines.base import EngineSpec
from zppo_actors.engines.sequences import Completion, Running
from zppo_actors.engines.transformers import attention
from zppo_actors.engines.transformers.decoder import Decoder, Ended
from zppo_actors.engines.uniforms import UniformStream
from zppo_protocol.values import Sampling

CHECK_PROMPT = np.arange(1, 6, dtype=np.int32)
CHECK_TOKENS = 8
CHECK_TOLERANCE = 0.03
"""Largest mean difference between token probabilities. In 16 bits a single one may be off by 0.06,
so it is the mean that tells rounding from another computation; it reaches 0.01.
"""


def load_model(spec: EngineSpec) -> Any:
    """Load the causal language model of `spec` onto its device, frozen. Raises UserError if it
    cannot be served."""
    transformers_logging.disable_progress_bar()
    where, folder = spec.served.model_path, spec.served.model.model
    try:
        refuse_other_state(AutoConfig.from_pretrained(folder).get_text_config(), folder, where)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, spec.served.model.dtype)
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{where}: {folder!r} is no causal language model that can be loaded ({reason})"
        ) from error
    model.to(device=_device(spec))
    return model.eval().requires_grad_(False)


def refuse_other_state(config: Any, folder: str, where: str) -> None:
    """Raise UserError for an architecture that carries more than keys and values from token to
    token."""
    odd = sorted(
        set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    )
    if odd or not hasattr(config, "num_attention_heads"):
        what = ", ".join(odd) if odd else "no attention heads"
        raise UserError(
            f"{where}: {folder!r} ({config.model_type}) keeps other state than a key-value cache "
            f"({what}), "
            "which the engine 'transformers' does not serve"
        )


def context_length(config: Any) -> int:
    """The longest sequence the model can take: its positions, or its sliding window where that is
    shorter."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 2**31)
    sliding = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    types = getattr(config, "layer_types", None)
    if not sliding or (types is not None and "sliding_attention" not in types):
        return positions
    return min(positions, int(sliding))


@torch.inference_mode()
def adopt_slots(model: Any, folder: str, where: str) -> None:
    """Switch `model` to our attention, after checking on a few tokens that decoding from slots
    gives its probabilities.

    Raises UserError if it does not: then the architecture has a part that a plain key-value cache
    cannot carry.
    """
    own = model.config._attn_implementation
    attention.register()
    try:
        model.set_attn_implementation(attention.NAME)
        found = _decode(model)
        model.set_attn_implementation(own)
        expected = _log_probs(model, found.token_ids)
        model.set_attn_implementation(attention.NAME)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: the engine 'transformers' cannot decode {folder!r} from slots ({error})"
        ) from error
    difference = float(np.abs(np.exp(found.log_probs) - np.exp(expected)).mean())
    if not difference < CHECK_TOLERANCE:
        raise UserError(
            f"{where}: the engine 'transformers' cannot serve {folder!r}: its token probabilities "
            "differ by "
            f"{difference:.3f} on average between decoding from slots and a plain forward pass "
            f"(at most {CHECK_TOLERANCE})"
        )


def _decode(model: Any) -> Completion:
    """A few tokens sampled from slots, with a twin in the batch."""
    decoder = Decoder(
        model, frozenset({-1}), max_rows=2, max_length=len(CHECK_PROMPT) + CHECK_TOKENS
    )
    sampling = Sampling(max_new_tokens=CHECK_TOKENS)
    decoder.admit(
        [[Running(CHECK_PROMPT, sampling, CHECK_TOKENS, i, UniformStream(0, i)) for i in range(2)]]
    )
    ended: list[Ended] = []
    while not ended:
        ended = decoder.step()
    return ended[0][1]


def _log_probs(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """What a plain forward pass over the same tokens says of them."""
    tokens = torch.tensor(
        np.concatenate([CHECK_PROMPT, token_ids])[None].astype(np.int64), device=model.device
    )
    start = len(CHECK_PROMPT)
    log_probs = (
        model(input_ids=tokens[:, :-1], use_cache=False)
        .logits[0, start - 1 :]
        .float()
        .log_softmax(-1)
    )
    chosen: np.ndarray = log_probs.gather(1, tokens[0, start:, None])[:, 0].cpu().numpy()
    return chosen


def _device(spec: EngineSpec) -> torch.device:
    try:
        device = torch.device(spec.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{spec.served.actor_path}.devices: {spec.device!r} is no device of this host "
            f"({reason})"
        ) from error
    return device
