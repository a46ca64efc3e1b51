"""The vLLM engine scores given tokens, for real, against plain forward passes of the same model."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_helpers import VOCABULARY, make_task, words
from scoring_helpers import assert_scores, forward, to_score
from vllm_helpers import CONTEXT, save_tiny, spec_of, tiny

from zppo_actors.engines import create
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.vllm.score import read_scores
from zppo_protocol.messages import ScoreTask
from zppo_protocol.samples import TokenScores
from zppo_protocol.values import ResponseStart

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
TOLERANCE = 1e-3
CALL_SECONDS = 1800.0


class Served:
    """A frozen engine and the loop it lives in."""

    def __init__(self, folder: Path, **engine_args: Any) -> None:
        self.runner = asyncio.Runner()
        self.engine: Any = create(spec_of(folder, **engine_args))

    def score(self, *tasks: ScoreTask) -> list[TokenScores]:
        async def all_of() -> list[TokenScores]:
            return await asyncio.gather(*(self.engine.score(task) for task in tasks))

        return self.runner.run(asyncio.wait_for(all_of(), CALL_SECONDS))

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.engine = None
        self.runner.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(save_tiny(tmp_path_factory.mktemp("teacher")))
    yield served
    served.close()


@pytest.mark.slow
@pytest.mark.vllm
@needs_vllm
def test_scores_are_the_best_of_a_plain_forward_pass(served: Served) -> None:
    tasks = [
        to_score([3, 0, 9, 1]),
        to_score([1], prompt=1, top_k=1, seed=1),
        to_score([0, 0], seed=2),
        to_score([20] * 6, prompt=90, top_k=VOCABULARY + 9, seed=3),
        to_score([7], prompt=CONTEXT - 7, seed=4),
    ]
    before = served.engine.progress
    for task, found in zip(tasks, served.score(*tasks, *tasks)[: len(tasks)], strict=True):
        if len(task.token_ids):
            assert_scores(found, forward(tiny(), task), min(task.top_k, VOCABULARY), TOLERANCE)
        else:
            assert found.token_ids.shape == (0, 6)
    assert served.engine.progress - before >= 2 * (13 + 1 + 120 + 7)


@pytest.mark.slow
@pytest.mark.vllm
@needs_vllm
def test_what_vllm_cannot_score_is_refused_for_good(served: Served) -> None:
    long = to_score([8], prompt=CONTEXT - 7)
    for task, sentence in (
        (
            to_score([2], temperature=0.5),
            "vLLM scores at temperature 1 only, not at 0.5; the engine 'transformers' does",
        ),
        (
            long,
            (
                f"prompt and response have {CONTEXT + 1} tokens together, more than the context of "
                f"{CONTEXT}"
            ),
        ),
    ):
        with pytest.raises(EngineError, match=sentence) as error:
            served.score(task)
        assert not error.value.retryable
    assert len(served.score(to_score([2]))[0].token_ids) == 2


@pytest.mark.slow
@pytest.mark.vllm
@needs_vllm
def test_a_response_with_a_given_start_is_whole(served: Served) -> None:
    task = make_task(words(4), n=2, max_new_tokens=5)
    prompt = msgspec.structs.replace(
        task.prompt, start=ResponseStart(text="w5 w6 w7 w8 w9", share=0.4)
    )
    started = msgspec.structs.replace(task, prompt=prompt)
    samples = served.runner.run(asyncio.wait_for(served.engine.generate(started), CALL_SECONDS))
    assert samples.prompt_ids[-2:].tolist() == [5, 6] and len(samples.prompt_ids) == 6
    assert all(text.startswith("w5 w6 ") for text in samples.texts)


# ---- reading what vLLM says, without it ----------------------------------------------------------


def flat(*positions: list[tuple[int, float]]) -> Any:
    """Flat log-probs of vLLM: of each position first the given token, then the most probable
    ones."""
    ends = np.cumsum([len(position) for position in positions]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[token for position in positions for token, _ in position],
        logprobs=[log_prob for position in positions for _, log_prob in position],
    )


def output(prompt: Any, sampled: Any) -> Any:
    return SimpleNamespace(prompt_logprobs=prompt, outputs=[SimpleNamespace(logprobs=sampled)])


FIRST = [(9, -5.0), (4, -0.5), (5, -1.5)]
SECOND = [(4, -0.25), (4, -0.25), (7, -2.0)]
LAST = [(8, -1.0), (6, -0.75), (8, -1.0)]


def test_the_given_token_is_left_out_and_the_last_position_comes_from_the_sampled_one() -> None:
    ids, log_probs = read_scores(output(flat([], FIRST, SECOND), flat(LAST)), length=3, width=2)
    assert ids.tolist() == [[4, 5], [4, 7], [6, 8]]
    assert log_probs.tolist() == [[-0.5, -1.5], [-0.25, -2.0], [-0.75, -1.0]]
    ids, _ = read_scores(output(flat([], FIRST, SECOND), flat(LAST)), length=1, width=2)
    assert ids.tolist() == [[6, 8]]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "vLLM ended a request without log-probs"),
        (output(flat([]), None), "vLLM ended a request without log-probs"),
        (output(flat([], FIRST), flat(LAST)), "vLLM ended a request with too few log-probs"),
        (
            output(flat([], FIRST, SECOND[:2]), flat(LAST)),
            "vLLM ended a request with too few log-probs",
        ),
    ],
)
def test_an_answer_that_lacks_something_may_be_asked_for_again(answer: Any, sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence) as error:
        read_scores(answer, length=3, width=2)
    assert error.value.retryable
