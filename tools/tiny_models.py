"""Tiny random models of every decoder family that transformers knows, as folders on disk.

Each is built from its own configuration class with all sizes made small, and with weights large
enough that a mistake in any part shows in the log-probs: standard initialisations leave attention
and positions almost without effect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 40
END_ID = 2
CONTEXT = 64
TOKENIZER = "tokenizer"
"""Folder in a model's folder that holds its tokenizer alone."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": END_ID,
    "pad_token_id": 0,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "indexer_n_heads": 4,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "max_seq_len": CONTEXT,
    "sliding_window": 16,
    "window_size": 16,
    "local_attention": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 16,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention; values are narrower than keys.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 6,
    # State spaces and linear attention.
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_mamba_heads": 2,
    "lru_width": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # Extras of single families.
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "rotary_dim": 4,
    "dropout": 0.0,
}
"""Names of sizes in the configurations, each set where a configuration has it."""
SECTIONS = ("text_config", "decoder", "decoder_config")
"""Where configurations of models with more than one part keep that of the language model."""
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "mamba2": {"head_dim": 8, "num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 2},
}
"""What a family needs on top of, or in place of, `SIZES`."""


def families() -> list[str]:
    """All model types that `AutoModelForCausalLM` can build."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model. Raises whatever transformers says about it."""
    default = AutoConfig.for_model(family)
    own = {**FAMILIES.get(family, {}), **changes}
    sizes = {name: value for name, value in SIZES.items() if _takes(default, name)}
    if "kv_lora_rank" in sizes:  # every head has keys of its own, and turns a part of them
        sizes |= {name: 4 for name in ("num_key_value_heads", "head_dim") if name in sizes}
    for section in SECTIONS:
        inner = getattr(default, section, None)
        if inner is not None and hasattr(inner, "model_type"):
            sizes[section] = tiny_config(inner.model_type).to_dict()
    return type(default)(**{**sizes, **own})


def _takes(config: Any, name: str) -> bool:
    """Whether the configuration has a size of this name that can be set."""
    if isinstance(prop := getattr(type(config), name, None), property) and prop.fset is None:
        return False
    return name in config.to_dict() or name in config.attribute_map


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A model in float32 on the CPU whose log-probs depend visibly on every part of it."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


def save_tiny(folder: Path, family: str, **changes: Any) -> None:
    """Write a tiny model and its tokenizer as a Hugging Face folder."""
    tiny_model(tiny_config(family, **changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    # Beside a configuration some families' own classes take a tokenizer over and read it otherwise.
    tiny_tokenizer().save_pretrained(folder / TOKENIZER)
