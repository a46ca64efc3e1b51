"""Loading a model folder for sampling, and the proof that our cache computes what the model's
authors compute without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from zppo.errors import UserError, first_line
from zppo.plan.architecture import (
    context_of,
    other_state,
    refuse_other_state,
    slots_window_of,
)
from zppo.prompting.picture_families import unsampled_ids
from zppo.training.fidelity import EAGER, FAULTS, LARGEST_DIFFERENCE
from zppo.training.loading import load_folder, model_class, read_config
from zppo_actors.engines.base import EngineSpec
from zppo_actors.engines.sequences import Completion, Running
from zppo_actors.engines.transformers import attention
from zppo_actors.engines.transformers.decoder import Decoder, Ended
from zppo_actors.engines.uniforms import UniformStream
from zppo_protocol.values import Sampling

CHECK_LENGTHS = (1, 6, 19)
"""Prompts of the check, each with a twin, all in one batch."""
CHECK_TOKENS = 8


def load_model(spec: EngineSpec) -> Any:
    """Load the causal language model of `spec` onto its device, frozen. Raises UserError if it
    cannot be served."""
    transformers_logging.disable_progress_bar()
    where, folder = spec.served.model_path, spec.served.model.model
    refuse_unserved(read_config(folder, where), folder, where)
    device = _device(spec)
    model = load_folder(folder, spec.served.model.dtype, where)
    try:
        model.to(device=device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{spec.served.actor_path}.devices: {folder!r} does not fit on {spec.device!r} "
            f"({first_line(error)}); expected a card with more free memory"
        ) from error
    return model.eval().requires_grad_(False)


def refuse_unserved(config: Any, folder: str, where: str) -> None:
    """Raise UserError for an architecture that is no decoder, or carries from token to token what
    slots do not hold."""
    model_class(config, folder, where)
    text = config.get_text_config()
    refuse_other_state(other_state(text.to_dict()), config.model_type, folder, where)
    if not hasattr(text, "num_attention_heads"):
        refuse_other_state("no attention heads", config.model_type, folder, where)


def context_length(config: Any) -> int:
    """The longest sequence that slots can hold: the model's context, or what
    `zppo.plan.architecture.slots_window_of` says. `config` is that of the text part."""
    text = config.to_dict()
    context = context_of(text)
    return min(context, slots_window_of(text) or context)


@torch.inference_mode()
def adopt_slots(model: Any, folder: str, where: str) -> None:
    """Switch `model` to our attention, after checking on a few sequences that decoding from slots
    gives the log-probs that its authors' own attention gives one sequence at a time.

    Raises UserError if it does not: then the architecture has a part that a plain key-value cache
    cannot carry.
    """
    attention.register()
    try:
        _attend(model, EAGER)
        _check_cache(model, folder, where)
        _attend(model, attention.NAME)
        sampled = _decode(model, min(context_length(model.config.get_text_config()), 1 << 16))
        _attend(model, EAGER)
        difference = max(_difference(model, *one) for one in sampled)
        _attend(model, attention.NAME)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(
            f"{where}: the engine 'transformers' cannot decode {folder!r} from slots "
            f"({first_line(error)})"
        ) from error
    limit = LARGEST_DIFFERENCE[model.dtype]
    if not difference < limit:
        raise UserError(
            f"{where}: the engine 'transformers' cannot serve {folder!r}: the log-prob of a token "
            f"differs by {difference:.3f} between decoding from slots and a plain forward pass "
            f"(less than {limit:g} is rounding)"
        )


def _attend(model: Any, implementation: str) -> None:
    """Switch the attention of the text model alone: what sees pictures looks in all directions, and
    keeps its own."""
    config = model.config
    text = [
        name
        for name in config.sub_configs
        if getattr(config, name, None) is config.get_text_config()
    ]
    if text:
        model.set_attn_implementation({"": implementation, text[0]: implementation})
    else:
        model.set_attn_implementation(implementation)


def _check_cache(model: Any, folder: str, where: str) -> None:
    """Raise UserError unless the model itself keeps its past in a plain cache of all layers."""
    ids = torch.arange(1, 5, device=model.device)[None]
    past = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if not isinstance(past, DynamicCache):
        refuse_other_state(type(past).__name__, model.config.model_type, folder, where)


def _decode(model: Any, context: int) -> list[tuple[np.ndarray, Completion]]:
    """Prompts and what was sampled behind them, all in one batch and of unequal lengths."""
    lengths = [max(1, min(length, context - CHECK_TOKENS)) for length in CHECK_LENGTHS]
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    prompts = [(np.arange(1, length + 1) * 7 % vocabulary).astype(np.int32) for length in lengths]
    decoder = Decoder(
        model, frozenset({-1}), max_rows=2 * len(prompts), max_length=max(lengths) + CHECK_TOKENS
    )
    sampling = Sampling(max_new_tokens=CHECK_TOKENS)
    groups = [
        [Running(prompt, sampling, CHECK_TOKENS, i, UniformStream(m, i)) for i in range(2)]
        for m, prompt in enumerate(prompts)
    ]
    decoder.admit(groups)
    ended: list[Ended] = []
    while decoder.running:
        ended += decoder.step()
    return [(sequence.prompt_ids, completion) for sequence, completion in ended]


def _difference(model: Any, prompt: np.ndarray, found: Completion) -> float:
    """Largest difference from what a plain forward pass over the same tokens says of them."""
    tokens = np.concatenate([prompt, found.token_ids]).astype(np.int64)
    ids = torch.from_numpy(tokens).to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    unsampled = unsampled_ids(model.config.to_dict())
    if unsampled:
        logits[:, list(unsampled)] = -torch.inf
    expected = logits.float().log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].cpu()
    # NaN, from either side, is no match.
    return float(np.nan_to_num(np.abs(expected.numpy() - found.log_probs), nan=np.inf).max())


def _device(spec: EngineSpec) -> torch.device:
    try:
        device = torch.device(spec.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(
            f"{spec.served.actor_path}.devices: {spec.device!r} is no device of this host "
            f"({reason})"
        ) from error
    return device
