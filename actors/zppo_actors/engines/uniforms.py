"""The random numbers of a response: a function of its task and its place in the group, whatever the
batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LARGEST_UNIFORM = 1.0 - 2.0**-20
"""Keeps `u * total` below `total` in float32, so that the search never runs off the end."""


class UniformStream:
    """The random numbers of one sequence, a function of the task's seed and the sequence's index in
    its group alone."""

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([seed, index]))
        )

    def take(self, count: int) -> Tensor:
        """The next `count` numbers in [0, 1), float32 [count]; the stream does not depend on how it
        is cut."""
        numbers = np.minimum(self._generator.random(count), LARGEST_UNIFORM)
        return torch.from_numpy(numbers.astype(np.float32))
