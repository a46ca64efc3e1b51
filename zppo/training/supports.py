"""The supports of a window's tokens, where the student's sampling was truncated.

They stay on the host as they came, end to end, and only those of a micro-batch are padded to its
longest: of a whole window they would be many times the tokens.

Shape legend: T response tokens of the window, M ids of all supports, R tokens of a micro-batch, K
ids of its longest support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zppo_protocol.samples import GroupSamples
from zppo_protocol.support import joined

PAD = -1
"""Fills a row behind its support; a row of it alone is the whole vocabulary."""


@dataclass(frozen=True)
class Supports:
    """`ids_M` end to end; that of token t begins at `starts_T[t]` and has `lengths_T[t]` ids, 0 for
    the whole vocabulary."""

    ids_M: np.ndarray
    starts_T: np.ndarray
    lengths_T: np.ndarray

    def padded(self, tokens_R: np.ndarray) -> np.ndarray | None:
        """The supports of these tokens, int32 [R, K]; None if all are the whole vocabulary."""
        lengths_R = self.lengths_T[tokens_R]
        width = int(lengths_R.max(initial=0))
        if width == 0:
            return None
        columns_K = np.arange(width)
        places_RK = self.starts_T[tokens_R, None] + columns_K
        inside_RK = columns_K < lengths_R[:, None]
        return np.where(inside_RK, self.ids_M[np.where(inside_RK, places_RK, 0)], PAD)


def supports_of(groups: Sequence[GroupSamples]) -> Supports | None:
    """The supports of groups laid end to end; None where no token has one."""
    support = joined([(samples.support, len(samples.token_ids)) for samples in groups])
    if support is None:
        return None
    lengths_T = support.lengths_T.astype(np.int64)
    return Supports(support.ids, np.cumsum(lengths_T) - lengths_T, lengths_T)
