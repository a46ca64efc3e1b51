"""Prompts of tokenizers without a chat template: what stands before a text stays, what stands
behind it goes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from zppo.prompting.tokenization import encode_prompts
from zppo_protocol.values import ChatMessage, Prompt, ResponseStart

WORDS = ["<bos>", "<eos>", "<sep>", "a", "b", "c"]


def tokenizer_of(frame: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a text into this frame, e.g. `<bos> $A <eos>`."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="c"))
    inner.pre_tokenizer = Whitespace()
    special = [(word, WORDS.index(word)) for word in WORDS[:3]]
    inner.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("$A", [3, 4]),
        ("<bos> $A", [0, 3, 4]),
        ("$A <eos>", [3, 4]),
        ("<bos> $A <eos>", [0, 3, 4]),
        ("<bos> <sep> $A <sep> <eos>", [0, 2, 3, 4]),
    ],
)
def test_no_end_stands_behind_a_prompt(frame: str, expected: list[int]) -> None:
    prompt = Prompt(messages=[ChatMessage(role="user", content="a b")])
    assert encode_prompts(tokenizer_of(frame), [prompt, prompt]) == [expected, expected]


def test_a_given_start_follows_the_prompt_at_once() -> None:
    prompt = Prompt(
        messages=[ChatMessage(role="user", content="a")], start=ResponseStart(text="b c", share=1.0)
    )
    assert encode_prompts(tokenizer_of("<bos> $A <eos>"), [prompt]) == [[0, 3, 4, 5]]
