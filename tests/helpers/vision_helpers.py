"""A tiny random model that sees pictures, with its processor, and what a plain forward pass says of
its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_helpers import completions
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from zppo.data.pictures import refer
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import PictureReference

SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 58)), "USER", "SYSTEM", *SPECIAL]
END_ID, IMAGE_ID = 2, WORDS.index("<image>")
PICTURE_TOKENS = 4
"""A picture of 56 by 56 has 4 by 4 patches, of which 2 by 2 become one token."""
TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% "
    "endfor %}"
)
"""Content is a list of parts, as in the templates of most models that see pictures."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=SPECIAL, **names
    )


def make_processor() -> Idefics3Processor:
    size = {"longest_edge": 56}
    pictures = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    return Idefics3Processor(
        pictures, make_tokenizer(), image_seq_len=PICTURE_TOKENS, chat_template=TEMPLATE
    )


def make_seeing(seed: int = 0) -> Any:
    """A random Idefics3 whose pictures matter to its words, and whose greedy responses never
    end."""
    shared = {
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    vision = Idefics3VisionConfig(hidden_size=64, image_size=56, patch_size=14, **shared)
    words = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": END_ID, "pad_token_id": 0}
    heads = {
        "hidden_size": 64,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    text = LlamaConfig(**heads, **words, **shared)
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config).eval().requires_grad_(False)
    model.lm_head.weight[END_ID] = 0.0
    return model


def save_seeing(model: Any, folder: Path) -> Path:
    """Write model, processor and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def picture(folder: Path, seed: int) -> PictureReference:
    """A picture of coloured noise."""
    path = folder / f"picture-{seed}.png"
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return refer(path)


def seen(text: str, media: list[PictureReference]) -> dict[str, torch.Tensor]:
    """What the Hugging Face processor makes of a rendered prompt and its pictures."""
    images = [Image.open(reference.path).convert("RGB") for reference in media] or None
    return dict(make_processor()(text=text, images=images, return_tensors="pt"))


def seeing_logits(model: Any, samples: GroupSamples, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Logits [T, V] at the sampled tokens by plain forward passes over prompt, pictures and
    completion, -inf for the token that stands for a picture."""
    parts = []
    prompt = inputs["input_ids"]
    pixels = {name: tensor for name, tensor in inputs.items() if name.startswith("pixel")}
    for token_ids in completions(samples):
        tokens = torch.cat([prompt, torch.tensor([token_ids])], 1)
        logits = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **pixels
        ).logits
        logits[..., IMAGE_ID] = -torch.inf
        parts.append(logits[0, prompt.shape[1] - 1 : -1].float())
    return torch.cat(parts).numpy()
