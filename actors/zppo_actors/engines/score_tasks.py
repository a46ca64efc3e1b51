"""What every engine that scores does around its forward passes: refuse what it cannot read, and lay
out the answer.

Legend: T response tokens of a task, K most probable tokens, n tokens of one response.
"""

from __future__ import annotations

import numpy as np

from zppo_actors.engines.base import EngineError
from zppo_protocol.messages import ScoreTask
from zppo_protocol.samples import TokenScores

NO_TOKEN = -1


def check_scorable(task: ScoreTask, vocabulary: int, max_length: int) -> None:
    """Raise EngineError for a task that no model of this vocabulary and context can read."""
    longest = len(task.prompt_ids) + int(np.diff(task.offsets).max())
    if longest > max_length:
        reason = (
            f"prompt and response have {longest} tokens together, more than the context of "
            f"{max_length}"
        )
        raise EngineError(reason, retryable=False)
    largest = max(int(task.prompt_ids.max()), int(task.token_ids.max(initial=0)))
    if largest >= vocabulary:
        reason = (
            f"the tokens to score hold token id {largest}, but the model has {vocabulary} tokens"
        )
        raise EngineError(reason, retryable=False)


class ScoreTable:
    """The answer to a task in the making; rows of tokens that were not scored yet hold no token."""

    def __init__(self, task: ScoreTask, vocabulary: int) -> None:
        self.width = min(task.top_k, vocabulary)
        self._offsets = task.offsets
        shape = (len(task.token_ids), self.width)
        self._ids_TK = np.full(shape, NO_TOKEN, dtype=np.int32)
        self._log_probs_TK = np.zeros(shape, dtype=np.float32)

    def put(self, index: int, ids_nK: np.ndarray, log_probs_nK: np.ndarray) -> None:
        """Write the rows of response `index`, best token first; a token of probability 0 is none.

        Raises EngineError for numbers that no distribution has.
        """
        if np.isnan(log_probs_nK).any() or (log_probs_nK == np.inf).any():
            raise EngineError(
                "the model gives probabilities that are not finite numbers", retryable=True
            )
        rows = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        possible_nK = log_probs_nK > -np.inf
        self._ids_TK[rows] = np.where(possible_nK, ids_nK, NO_TOKEN)
        self._log_probs_TK[rows] = np.where(possible_nK, np.minimum(log_probs_nK, 0.0), 0.0)

    def scores(self) -> TokenScores:
        return TokenScores(token_ids=self._ids_TK, log_probs=self._log_probs_TK)
