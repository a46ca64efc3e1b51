"""Tiny random models on disk and tasks for them, shared by the tests of engines and their
actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zppo.prompting.picture_families import unsampled_ids
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import ChatMessage, Prompt, Sampling

VOCABULARY = 40
END_ID = 2
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": END_ID,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def make_model(kind: str = "qwen3", seed: int = 0, **changes: Any) -> Any:
    """A small random model; `initializer_range` is large so that its distributions are far from
    uniform."""
    config_type, model_type = MODELS[kind]
    sizes = {**SIZES, "head_dim": 8, **changes} if kind == "qwen3" else {**SIZES, **changes}
    torch.manual_seed(seed)
    return model_type(config_type(**sizes)).eval().requires_grad_(False)


def make_tokenizer(end_token: str | None = "<eos>") -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_token,
        bos_token="<bos>",
        pad_token="<pad>",
        unk_token="<pad>",
    )


def save(model: Any, folder: Path, end_token: str | None = "<eos>") -> Path:
    """Write model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    make_tokenizer(end_token).save_pretrained(folder)
    return folder


def words(count: int, start: int = 3) -> str:
    """A prompt of `count` tokens."""
    return " ".join(f"w{3 + (start + 7 * i) % (VOCABULARY - 3)}" for i in range(count))


def make_task(
    text: str, n: int = 1, task_id: str = "t", seed: int = 0, kind: str = "plain", **sampling: Any
) -> GenerateTask:
    settings = Sampling(**{"max_new_tokens": 16, **sampling})
    prompt = Prompt(messages=[ChatMessage(role="user", content=text)])
    return GenerateTask(
        task_id=task_id, kind=kind, prompt=prompt, n=n, sampling=settings, seed=seed
    )


def completions(samples: GroupSamples) -> list[list[int]]:
    """Token ids of each completion."""
    return [part.tolist() for part in np.split(samples.token_ids, samples.offsets[1:-1])]


def versions(samples: GroupSamples) -> list[int]:
    """The policy version of every token [T]."""
    counts, of_span = samples.version_spans.T
    return np.repeat(of_span, counts).tolist()


def forced_log_probs(model: Any, samples: GroupSamples, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [T] of the sampled tokens by plain forward passes of `model` over prompt and
    completion."""
    parts = []
    for token_ids in completions(samples):
        tokens = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        logits = (
            model(input_ids=tokens, use_cache=False)
            .logits[0, len(samples.prompt_ids) - 1 : -1]
            .float()
        )
        logits[:, list(unsampled_ids(model.config.to_dict()))] = -torch.inf
        log_probs = (logits / temperature).log_softmax(-1)
        parts.append(log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].numpy())
    return np.concatenate(parts)
