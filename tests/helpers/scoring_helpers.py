"""What to score, and what a plain forward pass of the same model says about it.

Shape legend: T response tokens, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from engine_helpers import VOCABULARY

from zppo_protocol.messages import ScoreTask
from zppo_protocol.samples import TokenScores


def to_score(
    lengths: list[int],
    *,
    prompt: int = 5,
    top_k: int = 6,
    temperature: float = 1.0,
    seed: int = 0,
    name: str = "s",
) -> ScoreTask:
    """Random responses of these lengths behind a random prompt."""
    random = np.random.default_rng(seed)
    return ScoreTask(
        task_id=name,
        prompt_ids=random.integers(3, VOCABULARY, prompt).astype(np.int32),
        token_ids=random.integers(3, VOCABULARY, sum(lengths)).astype(np.int32),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        top_k=top_k,
        temperature=temperature,
    )


def forward(model: Any, task: ScoreTask) -> np.ndarray:
    """Log-probs [T, V] of the task's tokens, one unpadded forward pass a response."""
    rows = []
    for response in np.split(task.token_ids, task.offsets[1:-1]):
        ids = torch.tensor(np.concatenate([task.prompt_ids, response]).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(task.prompt_ids) - 1 : -1]
        rows.append((logits.double() / task.temperature).log_softmax(-1))
    return torch.cat(rows).numpy()


def assert_scores(
    found: TokenScores, expected_TV: np.ndarray, count: int, tolerance: float = 1e-4
) -> None:
    """The `count` best of each row, best first; ids may differ only where two tokens are equally
    probable."""
    assert found.token_ids.shape == (len(expected_TV), count)
    best_TK = -np.sort(-expected_TV, axis=1)[:, :count]
    assert np.abs(found.log_probs - best_TK).max(initial=0.0) < tolerance
    named_TK = np.take_along_axis(expected_TV, found.token_ids.astype(np.int64), axis=1)
    assert np.abs(named_TK - found.log_probs).max(initial=0.0) < tolerance
    assert all(len(set(row)) == count for row in found.token_ids.tolist())
