"""Tiny random models with recurrent layers, alone and behind a tower for pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from tiny_models import tiny_config

CONTEXT = 2048
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "qwen3_next": {},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon_h1": {"num_hidden_layers": 2},
    "lfm2_moe": {},
}
"""With a delta rule, with states of Mamba 2, with both beside attention in a layer, and with
convolutions alone."""
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
SPECIAL = [
    *("<pad>", "<bos>", "<eos>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
"""A token for every byte: AutoTokenizer reads the tokenizer of this family as one of bytes."""
PICTURES_ALONE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
TEMPLATE = PICTURES_ALONE.replace(
    "{% else %}{{ part.text",
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text",
)
SMALLEST, LARGEST = 32 * 32, 64 * 32 * 32
"""Areas, in pixels, that its processor makes pictures of: from 1 feature to 64."""
VIDEO_SETTINGS: dict[str, Any] = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 4 * SMALLEST, "longest_edge": LARGEST},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
"""Of its processor of videos, as save_pretrained writes them; the areas are of all frames
together, and the values of pixels are other ones than of pictures."""


def make_recurrent(family: str, seed: int = 0, **sizes: Any) -> Any:
    """A model in float32 on whose log-probs states and convolutions show."""
    torch.manual_seed(seed)
    changes = {"max_position_embeddings": CONTEXT, **FAMILIES[family], **sizes}
    config = tiny_config(family, **changes)
    return _lively(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def make_seeing(seed: int = 0, first_mark: int = 3, **sizes: Any) -> Any:
    """A Qwen3.5 with a tower for pictures; its marks have four ids from `first_mark` on, as its
    tokenizer has them by default. `sizes` are of its language part."""
    torch.manual_seed(seed)
    sizes = {"max_position_embeddings": CONTEXT, "vocab_size": len(TOKENS), **sizes}
    text = tiny_config("qwen3_5_text", **sizes).to_dict()
    tower = TOWER | {"out_hidden_size": text["hidden_size"]}
    names = ("vision_start", "vision_end", "image", "video")
    marks = {f"{name}_token_id": i for i, name in enumerate(names, start=first_mark)}
    config = Qwen3_5Config(
        text_config=text, vision_config=tower, tie_word_embeddings=False, **marks
    )
    return _lively(Qwen3_5ForConditionalGeneration(config))


def save_seeing(model: Any, folder: Path, template: str = TEMPLATE) -> Path:
    """Write a model of `make_seeing` as a Hugging Face folder, with all that lies in one."""
    model.save_pretrained(folder)
    bytes_alone = BPE({token: i for i, token in enumerate(TOKENS)}, merges=[], unk_token="<pad>")
    tokenizer = Tokenizer(bytes_alone)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[3:], **names
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_SETTINGS))
    return folder


def make_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, min_pixels=SMALLEST, max_pixels=LARGEST
    )


@torch.no_grad()
def _lively(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.get_output_embeddings().weight.mul_(4.0)
    return model.eval().requires_grad_(False)
