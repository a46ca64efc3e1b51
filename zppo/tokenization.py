"""Prompts as token ids: the one way from chat messages to what a model reads, for engines and for checks at launch.

A prompt goes through the chat template of the tokenizer, up to where the response starts. A tokenizer without a
template gets the messages one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zppo.errors import UserError
from zppo_protocol.messages import Prompt


def load_tokenizer(folder: str, where: str) -> Any:
    """The tokenizer of a model folder. Raises UserError, naming the setting `where`, if it cannot be loaded."""
    from transformers import AutoTokenizer  # here, because it takes seconds and most commands need none

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {folder!r} has no tokenizer that can be loaded ({_first_line(error)})") from error


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, in one batch. Pictures and videos are left out."""
    if not prompts:
        return []
    if tokenizer.chat_template is None:
        texts = ["\n".join(message.content for message in prompt.messages) for prompt in prompts]
        ids: list[list[int]] = tokenizer(texts)["input_ids"]
        return ids
    chats = [[{"role": message.role, "content": message.content} for message in prompt.messages] for prompt in prompts]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
    return ids


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
