"""Tiny models that vLLM serves on a CPU, and what a plain forward pass says of its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from engine_helpers import END_ID, completions, make_model, save
from served import student_of

from zppo_actors.engines import EngineSpec
from zppo_protocol.samples import GroupSamples

CONTEXT = 1024
ENGINE_ARGS: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 16, "block_size": 32}
"""No compilation: it takes longer than all tests together."""


def tiny(seed: int = 0, tied: bool = True) -> Any:
    """A random Llama with the smallest heads that vLLM has kernels for; its greedy responses never
    end.

    `tied`: the output head is the embedding, of which vLLM keeps a second, packed copy on a CPU.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = make_model(
        "llama", seed, max_position_embeddings=CONTEXT, tie_word_embeddings=tied, **sizes
    )
    model.lm_head.weight[END_ID] = 0.0
    return model


def spec_of(folder: Path, **engine_args: Any) -> EngineSpec:
    """How an actor would build the engine for the model in `folder`."""
    served = student_of(folder, engine="vllm", **{**ENGINE_ARGS, **engine_args})
    one_thread = msgspec.structs.replace(served.actor, threads=1)
    return EngineSpec(served=msgspec.structs.replace(served, actor=one_thread))


def save_tiny(folder: Path, seed: int = 0, tied: bool = True) -> Path:
    return save(tiny(seed, tied), folder)


def truncated_log_probs(
    model: Any, samples: GroupSamples, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Log-probs [T] after temperature, then top-k, then top-p, renormalised: written out token by
    token."""
    parts = []
    for token_ids in completions(samples):
        tokens = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        logits_TV = (
            model(input_ids=tokens, use_cache=False)
            .logits[0, len(samples.prompt_ids) - 1 : -1]
            .float()
        )
        rows = (logits_TV / temperature).double().numpy()
        parts += [
            _truncated(row, top_k, top_p)[token] for row, token in zip(rows, token_ids, strict=True)
        ]
    return np.array(parts)


def _truncated(logits_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    order = np.argsort(-logits_V)[:top_k]
    shares = np.exp(logits_V[order] - logits_V[order[0]])
    shares /= shares.sum()
    # A token stays while those before it have not reached top_p.
    kept = order[np.cumsum(shares) - shares < top_p]
    log_probs_V = np.full(len(logits_V), -np.inf)
    log_probs_V[kept] = logits_V[kept] - np.logaddexp.reduce(logits_V[kept])
    return log_probs_V
