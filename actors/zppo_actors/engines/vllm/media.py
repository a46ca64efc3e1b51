"""Prompts with pictures for vLLM: chat messages with places for them, and the pictures themselves.

A prompt goes to vLLM as token ids with *one* placeholder a picture, as the chat template writes it,
and the pictures beside it; vLLM's own processor of the model puts as many tokens in the
placeholder's stead as the picture has features. The invariant: what comes back as the prompt of a
sample is that expanded prompt, the ids that the model has really read, and the same as the model's
own Hugging Face processor makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig

from zppo.data.pictures import FORMATS, picture_problem
from zppo.errors import UserError
from zppo.prompting.tokenization import encode_start
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_protocol.values import MediaReference, Prompt

PROBE = "probe"
MARKS = ("image_token_id", "image_token_index")
"""Where configurations keep the id of the token that stands for (a part of) a picture."""


def takes_pictures(folder: str) -> bool:
    """Whether the model in `folder` has an encoder of pictures."""
    return getattr(AutoConfig.from_pretrained(folder), "vision_config", None) is not None


class PictureTokenizer(PromptTokenizer):
    """The tokenizer of a model that takes pictures: placeholders stand where the chat template puts
    them."""

    def __init__(self, folder: str, where: str) -> None:
        """Raises UserError if the tokenizer has no chat template that takes messages of several
        parts."""
        super().__init__(folder, where)
        if not _takes_parts(self._tokenizer):
            raise UserError(
                f"{where}: the model {folder!r} takes pictures, but its tokenizer has no chat "
                "template that takes messages of text and pictures"
            )
        config = AutoConfig.from_pretrained(folder)
        self._mark: Any = next(
            (mark for name in MARKS if (mark := getattr(config, name, None)) is not None), None
        )

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids [P] int32 with one placeholder a picture.

        Raises EngineError for a prompt without tokens, or one with more marks of pictures than
        pictures: at such a mark vLLM would look for features that are not there, and its engine
        core ends.
        """
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages_of(prompt),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **prompt.chat_template_kwargs,
        )
        if prompt.start is not None:
            ids = ids + encode_start(self._tokenizer, prompt.start)
        if not ids:
            raise EngineError("the prompt has no tokens", retryable=False)
        if ids.count(self._mark) > len(prompt.media):
            raise EngineError("the words of the prompt hold the mark of a picture", retryable=False)
        return np.asarray(ids, dtype=np.int32)


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts; pictures come before the text of the last message
    of the user."""
    last = max(
        (i for i, message in enumerate(prompt.messages) if message.role == "user"), default=0
    )
    pictures = [{"type": "image"} for _ in prompt.media]
    return [
        {
            "role": message.role,
            "content": [
                *(pictures if i == last else []),
                {"type": "text", "text": message.content},
            ],
        }
        for i, message in enumerate(prompt.messages)
    ]


def open_pictures(media: Sequence[MediaReference]) -> list[Image.Image]:
    """Read and decode pictures as RGB. Raises EngineError for a video, and for a file that is no
    whole picture."""
    return [_open(reference) for reference in media]


def _open(reference: MediaReference) -> Image.Image:
    path = Path(reference.path)
    if reference.kind != "image":
        reason = (
            "videos are not passed on to vLLM, because nothing says which of their frames the "
            "model should see"
        )
        raise EngineError(f"{path}: {reason}", retryable=False)
    if problem := picture_problem(path):
        raise EngineError(f"the picture {str(path)!r} {problem}", retryable=False)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # what Pillow's decoders raise on broken data is of many kinds
        raise EngineError(
            f"the picture {str(path)!r} is unreadable ({error})", retryable=False
        ) from error


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template shows the text of a part, and not the part itself as Python prints
    it."""
    parts = [{"type": "text", "text": PROBE}]
    messages = [{"role": "user", "content": parts}]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ValueError, TypeError):
        return False
    return PROBE in text and "'type'" not in text
