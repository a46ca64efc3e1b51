"""How long a response may be, the same in every engine that holds a model."""

from __future__ import annotations

import numpy as np
import pytest

from zppo_actors.engines.base import EngineError
from zppo_actors.engines.sequences import budget_of
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import ChatMessage, Prompt, Sampling

TASK = GenerateTask(
    task_id="0/q/plain",
    kind="plain",
    prompt=Prompt(messages=[ChatMessage(role="user", content="how many?")]),
    n=1,
    sampling=Sampling(max_new_tokens=10),
    seed=0,
    min_version=0,
)


@pytest.mark.parametrize(("length", "budget"), [(1, 10), (22, 10), (23, 9), (31, 1)])
def test_a_response_has_what_the_task_allows_and_the_context_leaves(
    length: int, budget: int
) -> None:
    prompt_ids = np.full(length, 99, np.int32)
    assert budget_of(TASK, prompt_ids, vocabulary=100, max_length=32) == budget


@pytest.mark.parametrize(
    ("length", "largest", "reason"),
    [
        (32, 1, "the prompt has 32 tokens, which leaves no room in a context of 32"),
        (3, 100, "the prompt holds token id 100, but the model has 100 tokens"),
    ],
)
def test_a_prompt_that_no_response_can_follow_is_refused(
    length: int, largest: int, reason: str
) -> None:
    with pytest.raises(EngineError) as caught:
        budget_of(TASK, np.full(length, largest, np.int32), vocabulary=100, max_length=32)
    assert (str(caught.value), caught.value.retryable) == (reason, False)
