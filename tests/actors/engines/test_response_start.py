"""Responses with a given start: its tokens end the prompt, its text begins the response, in every
engine alike."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_helpers import (
    completions,
    forced_log_probs,
    make_model,
    make_task,
    make_tokenizer,
    save,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_helpers import build, run, sample

from zppo.plan.engines.openai import OpenAIArguments
from zppo.prompting.tokenization import encode_prompts, encode_start
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_actors.engines.simulated import Script, SimulatedEngine
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import ResponseStart, share_of

GIVEN = "w5 w6 w7 w8 w9 w10 w11"


def starting(task: GenerateTask, text: str = GIVEN, share: float = 0.4) -> GenerateTask:
    prompt = msgspec.structs.replace(task.prompt, start=ResponseStart(text=text, share=share))
    return msgspec.structs.replace(task, prompt=prompt)


def test_the_given_tokens_end_the_prompt_and_nothing_special_stands_between() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m.content }} {% endfor %}w39"
    )
    plain, started = make_task("w20 w21").prompt, starting(make_task("w20 w21")).prompt
    assert encode_prompts(tokenizer, [plain, started, plain]) == [
        [1, 20, 21, 39],
        [1, 20, 21, 39, 5, 6],
        [1, 20, 21, 39],
    ]


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.14, 0), (0.15, 1), (0.4, 2), (0.99, 6), (1.0, 7)]
)
def test_the_share_is_rounded_down(share: float, count: int) -> None:
    assert encode_start(make_tokenizer(), ResponseStart(text=GIVEN, share=share)) == list(
        range(5, 5 + count)
    )
    assert encode_start(make_tokenizer(), ResponseStart(text="", share=share)) == []


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 20_000), hundredths=st.integers(0, 100))
def test_a_product_that_is_whole_is_not_rounded_below_itself(count: int, hundredths: int) -> None:
    assert share_of(hundredths / 100, count) == hundredths * count // 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(), tmp_path_factory.mktemp("model"))


def test_a_model_goes_on_from_the_start_and_the_whole_response_is_graded(folder: Path) -> None:
    engine = build(folder)
    plain = make_task(words(4), n=3, seed=3, max_new_tokens=9)
    [started, other] = run(engine, sample(engine, starting(plain), plain))
    assert started.prompt_ids.tolist() == [*other.prompt_ids.tolist(), 5, 6]
    assert all(len(tokens) <= 9 for tokens in completions(started))
    assert abs(forced_log_probs(make_model(), started) - started.log_probs).max() < 1e-4
    for text, tokens in zip(started.texts, completions(started), strict=True):
        assert text.split() == ["w5", "w6", *(f"w{i}" for i in tokens if i > 2)]
    assert not any(text.startswith("w5 w6") for text in other.texts)


def test_the_start_counts_towards_the_context(folder: Path) -> None:
    engine = build(folder, max_length=6)
    [samples] = run(
        engine, sample(engine, starting(make_task(words(3), max_new_tokens=9), share=0.3))
    )
    assert len(samples.prompt_ids) == 5 and len(samples.token_ids) == 1
    engine = build(folder, max_length=6)
    with pytest.raises(
        EngineError, match="the prompt has 6 tokens, which leaves no room in a context of 6"
    ):
        run(engine, sample(engine, starting(make_task(words(3), max_new_tokens=9), share=0.5)))


@pytest.mark.parametrize(
    ("text", "share", "begin"), [("abcdefghij", 0.4, "abcd"), ("aéb", 0.5, "a"), ("", 1.0, "")]
)
def test_the_scripted_engine_begins_as_told(text: str, share: float, begin: str) -> None:
    task = make_task("q", n=2, seed=1)
    engine = SimulatedEngine(Script(), 8)
    started, plain = (
        asyncio.run(engine.generate(each)) for each in (starting(task, text, share), task)
    )
    assert started.texts == [begin + rest for rest in plain.texts]
    assert len(started.prompt_ids) == len(plain.prompt_ids) + len(begin)
    assert started.prompt_ids[: len(plain.prompt_ids)].tolist() == plain.prompt_ids.tolist()
    assert completions(started) == completions(plain)


def test_a_server_is_never_told_how_to_begin() -> None:
    engine: Any = OpenAIEngine(OpenAIArguments(base_url="http://127.0.0.1:9/v1"), "m", None)
    with pytest.raises(EngineError, match="a server cannot be told how a response begins") as error:
        run(engine, engine.generate(starting(make_task("q"))))
    assert not error.value.retryable
