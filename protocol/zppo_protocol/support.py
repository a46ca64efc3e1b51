"""The tokens that could have been sampled, token by token: what a truncated distribution was over.

Where top-k, top-p or min-p cut the distribution, a log-prob means nothing without the tokens that
were left, so they travel with the samples. Most supports are a few ids of a large vocabulary: as
bits they would take V/8 bytes a token (19 KB for 152,000), as ids 4 bytes each.

Invariant: ids rise within a row, so that a row is a set, and checking one costs a look at each id.

Shape legend: T tokens, M ids of all their supports laid end to end, N completions of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zppo_protocol.arrays import INT32, check_array, check_ids, check_offsets
from zppo_protocol.errors import ProtocolError
from zppo_protocol.values import Value


class Support(Value, frozen=True):
    """`ids` [M] int32 hold the supports of T tokens end to end, `offsets` [T+1] int32 bound them.

    Ids rise within a row. An empty row is the whole vocabulary: nothing was cut off there. Raises
    ProtocolError if they do not fit together.
    """

    ids: np.ndarray
    offsets: np.ndarray

    @property
    def lengths_T(self) -> np.ndarray:
        """Ids of each row, [T]; 0 for the whole vocabulary."""
        return np.diff(self.offsets)

    def picked(self, kept_T: np.ndarray) -> Support:
        """The rows where `kept_T` (bool) holds."""
        lengths_T = self.lengths_T
        return Support(
            ids=self.ids[np.repeat(kept_T, lengths_T)], offsets=offsets_of(lengths_T[kept_T])
        )

    def part(self, first: int, end: int) -> Support:
        """The rows from `first` to `end`."""
        offsets = self.offsets[first : end + 1]
        return Support(ids=self.ids[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])

    def __post_init__(self) -> None:
        check_support(self)


def support_of(rows: Sequence[np.ndarray]) -> Support:
    """One row of distinct ids for each token, in any order."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.concatenate([np.zeros(0, np.int32), *map(np.sort, rows)]).astype(np.int32)
    return Support(ids=ids, offsets=offsets_of(lengths))


def joined(parts: Sequence[tuple[Support | None, int]]) -> Support | None:
    """Supports of (rows or None, tokens) end to end; where there were none, rows are empty. None if
    there are none at all."""
    if all(support is None for support, _ in parts):
        return None
    ids = [support.ids for support, _ in parts if support is not None]
    lengths = [
        np.zeros(tokens, np.int64) if support is None else support.lengths_T
        for support, tokens in parts
    ]
    return Support(ids=np.concatenate(ids), offsets=offsets_of(np.concatenate(lengths)))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin and end, [T+1] int32."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def check_support(support: Support) -> None:
    """Check one support; cost O(M). Raises ProtocolError naming the field."""
    check_array("support.ids", support.ids, INT32, 1, check_ids)
    check_array("support.offsets", support.offsets, INT32)
    check_offsets("support.offsets", support.offsets, len(support.ids))
    starts = np.zeros(len(support.ids) + 1, dtype=np.bool_)
    starts[support.offsets] = True
    if not (starts[1:-1] | (np.diff(support.ids) > 0)).all():
        raise ProtocolError("support.ids must rise within a row")


def check_holds(support: Support, token_ids: np.ndarray, frozen_T: np.ndarray) -> None:
    """Check that there is a row for every token, with the token in it; only what no policy sampled
    (`frozen_T`) may have an empty one. Raises ProtocolError."""
    lengths_T = support.lengths_T
    if len(lengths_T) != len(token_ids):
        raise ProtocolError(
            f"support must have one row per token ({len(token_ids)}), got {len(lengths_T)}"
        )
    if ((lengths_T == 0) & ~frozen_T).any():
        raise ProtocolError("support must have an id for every token that a policy sampled")
    # Ids of a row are distinct, so no row can hold its token twice.
    held = np.count_nonzero(support.ids == np.repeat(token_ids, lengths_T))
    if held != np.count_nonzero(lengths_T):
        raise ProtocolError("support must hold the sampled token of every row")
