"""Which rollouts are read so that the metrics of the proximal policy speak of the whole window, and
with what weight.

Rollouts with a gradient are read in any case. Of the others a sample will do: their tokens lie end
to end, a comb with teeth at equal distances is laid over them from a random start, and a rollout is
read if a tooth falls on it (systematic sampling with probability proportional to size; Madow 1949).
Its weight is the tokens that its teeth stand for, spread over its own.

Invariants: the expected weight of every token is 1, so a weighted sum over tokens is unbiased; the
weights of all tokens add up to their number whatever the start, so a weighted mean is unbiased too.
The sample depends on seed, step and window alone: it is the same on all ranks and after a resume.

Shape legend: S rollouts of the window.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from zppo.training.batch import Rollouts

Measuring = Literal["all", "sample", "trained"]
SHARE = 1 / 16
"""Teeth of the comb for each rollout without a gradient."""
STREAM = 1
"""Keeps these draws apart from those of the mini-batches, which have the same seed and step."""


def measuring_weights(
    rollouts: Rollouts, trained_S: np.ndarray, measuring: Measuring, *, seed: int
) -> np.ndarray:
    """How many tokens each token of a rollout stands for, float64 [S]; 0: it is not read.

    `trained_S` marks the rollouts with a gradient. What a policy sampled and what a frozen model
    wrote are sampled apart, because some metrics are of the former alone.
    """
    if measuring == "all":
        return np.ones(rollouts.sequences)
    weights_S = trained_S.astype(np.float64)
    if measuring == "trained":
        return weights_S
    rng = np.random.default_rng([seed, rollouts.step, STREAM])
    frozen_S = rollouts.sampled_tokens_S == 0
    for kind_S in (~frozen_S, frozen_S):
        idle = np.flatnonzero(kind_S & ~trained_S & (rollouts.lengths_S > 0))
        if len(idle):
            teeth = int(np.ceil(SHARE * len(idle)))
            weights_S[idle] = comb_weights(rollouts.lengths_S[idle], teeth, rng.random())
    return weights_S


def comb_weights(lengths_S: np.ndarray, teeth: int, start: float) -> np.ndarray:
    """Weights of rollouts of these lengths, all above 0, under a comb of so many teeth that begins
    at `start`, a share in [0, 1) of the distance between two."""
    ends_S = np.cumsum(lengths_S)
    distance = ends_S[-1] / teeth
    # The last tooth could be rounded up to the end of the last token.
    points = np.minimum((np.arange(teeth) + start) * distance, ends_S[-1] - 0.5)
    hits_S = np.bincount(np.searchsorted(ends_S, points, "right"), minlength=len(lengths_S))
    weights_S: np.ndarray = hits_S * distance / lengths_S
    return weights_S
