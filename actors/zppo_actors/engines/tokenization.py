"""Between chat messages and tokens: prompts go in as ids, completions come out as text, nothing is
re-tokenised."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import GenerationConfig

from zppo.errors import UserError
from zppo.prompting.picture_layout import PictureLayout
from zppo.prompting.tokenization import encode_prompts, encode_start, load_tokenizer
from zppo_actors.engines.base import EngineError
from zppo_protocol.values import Prompt, ResponseStart


class PromptTokenizer:
    """A tokenizer with the ids that end a response (the tokenizer's own and those of the generation
    config)."""

    def __init__(self, folder: str, where: str) -> None:
        self._tokenizer: Any = load_tokenizer(folder, where)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"{where}: the tokenizer of {folder!r} has no end token, so no response would ever "
                "stop"
            )
        self.pictures: PictureLayout | None = None
        """How the model reads pictures, where the engine shows it some."""
        self.end_ids = frozenset({int(self._tokenizer.eos_token_id), *_configured_ends(folder)})

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids [P] int32 of the prompt, up to where sampling starts, with its pictures laid
        out. Raises EngineError if it has none, or pictures that the model does not take."""
        if prompt.media and self.pictures is None:
            raise EngineError(
                "this engine takes text only, but the prompt has pictures or videos",
                retryable=False,
            )
        try:
            [ids] = encode_prompts(self._tokenizer, [prompt], self.pictures)
        except ValueError as error:
            raise EngineError(str(error), retryable=False) from error
        if not ids:
            raise EngineError("the prompt has no tokens", retryable=False)
        return np.asarray(ids, dtype=np.int32)

    def decode(
        self, completions: list[np.ndarray], start: ResponseStart | None = None
    ) -> list[str]:
        """Texts of the responses, with the start that was given to them; without special tokens,
        spaces as they are."""
        given = [] if start is None else encode_start(self._tokenizer, start)
        texts: list[str] = self._tokenizer.batch_decode(
            [[*given, *completion.tolist()] for completion in completions],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return texts


def _configured_ends(folder: str) -> list[int]:
    """End ids of generation_config.json; chat models often list more than the tokenizer's one."""
    try:
        ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        return []
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
