"""What a training step minimises; the loop around it is the same for all.

Shape legend: S rollouts of the window.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from zppo.training.layout import MicroBatch


class Objective(Protocol):
    """The loss of one window. Parts of a mini-batch add up to its loss; metrics are sums as in
    `zppo_kernels`."""

    def live(self, sequences: np.ndarray) -> np.ndarray:
        """Those of the rollouts that have a gradient."""

    def loss(
        self, batch: MicroBatch, token_count: int, sequence_count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss of a mini-batch with so many tokens and rollouts, and
        its metrics."""

    def metrics(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """What it measured, after the updates; `parts` are the metrics of the applied ones."""
