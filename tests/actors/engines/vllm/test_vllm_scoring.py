"""What the scores of given tokens are read from. With the real engine: `test_vllm_engine.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zppo_actors.engines.base import EngineError
from zppo_actors.engines.vllm.score import _check_request, read_scores
from zppo_protocol.messages import ScoreTask
from zppo_protocol.values import PictureReference


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


def test_responses_to_pictures_are_refused_and_not_scored_without_them() -> None:
    task = ScoreTask(
        task_id="s",
        prompt_ids=np.array([1, 2], np.int32),
        token_ids=np.array([3], np.int32),
        offsets=np.array([0, 1], np.int32),
        top_k=2,
        media=[PictureReference(path="a.png", sha256="0" * 64, width=4, height=4)],
        media_tokens=[1],
    )
    with pytest.raises(EngineError) as refused:
        _check_request(task, width=2, most=20)
    assert not refused.value.retryable
    assert str(refused.value) == (
        "vLLM scores responses to text alone, and the prompt has pictures or videos; the engine "
        "'transformers' scores both"
    )
