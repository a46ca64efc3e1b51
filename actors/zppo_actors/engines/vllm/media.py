"""Prompts with pictures for vLLM: chat messages with places for them, and the pictures themselves.

A prompt goes to vLLM as token ids with *one* placeholder a picture, as the chat template writes it,
and the pictures beside it; vLLM's own processor of the model puts as many tokens in the
placeholder's stead as the picture has features. The invariant: what comes back as the prompt of a
sample is that expanded prompt, the ids that the model has really read, and the same as the model's
own Hugging Face processor makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig

from zppo.data.pictures import PictureError, read_picture
from zppo.errors import UserError
from zppo.prompting.content import messages_in_parts
from zppo.prompting.tokenization import encode_start, takes_parts
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_protocol.values import Media, Prompt, pictures_of

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
        if not takes_parts(self._tokenizer):
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
            messages_in_parts(prompt, lambda _: {"type": "image"}),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **prompt.chat_template_kwargs,
        )
        if prompt.start is not None:
            ids = ids + encode_start(self._tokenizer, prompt.start)
        if not ids:
            raise EngineError("the prompt has no tokens", retryable=False)
        if ids.count(self._mark) > len(list(pictures_of(prompt.media))):
            raise EngineError("the words of the prompt hold the mark of a picture", retryable=False)
        return np.asarray(ids, dtype=np.int32)


def open_pictures(media: Sequence[Media]) -> list[Image.Image]:
    """Read and decode pictures, and the frames of videos, as RGB. Raises EngineError for a file
    that is not what was referred to."""
    try:
        return [read_picture(reference) for reference in pictures_of(media)]
    except PictureError as error:
        raise EngineError(str(error), retryable=False) from error


def media_tokens(media: Sequence[Media], pictures: Sequence[int]) -> list[int]:
    """Tokens of each picture or video, from those of all `pictures` and frames in their order."""
    left = iter(pictures)
    return [sum(itertools.islice(left, len(list(pictures_of([one]))))) for one in media]
