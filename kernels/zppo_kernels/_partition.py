"""Token-balanced partition: longest processing time first, then improving moves and swaps."""

from __future__ import annotations

import numpy as np

from ._numba import compiled


def partition_labels(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Lengths int64 [B] -> label int64 [B] in [0, parts)."""
    order = np.argsort(-lengths, kind="stable")
    labels = np.empty(len(lengths), np.int64)
    loads = np.zeros(parts, np.int64)
    _longest_first(lengths, order, labels, loads)
    while _improve(lengths, labels, loads):
        pass
    return labels


@compiled()
def _longest_first(
    lengths: np.ndarray, order: np.ndarray, labels: np.ndarray, loads: np.ndarray
) -> None:
    for index in order:
        lightest = np.argmin(loads)
        labels[index] = lightest
        loads[lightest] += lengths[index]


@compiled()
def _improve(lengths: np.ndarray, labels: np.ndarray, loads: np.ndarray) -> bool:
    """One move or swap between heaviest and lightest part that brings them nearer; False when there
    is none."""
    heavy, light = np.argmax(loads), np.argmin(loads)
    gap = loads[heavy] - loads[light]
    best_shift, best_give, best_take = 0, -1, -1
    for give in range(len(lengths)):
        if labels[give] != heavy:
            continue
        for take in range(-1, len(lengths)):
            if take >= 0 and labels[take] != light:
                continue
            shift = lengths[give] - (lengths[take] if take >= 0 else 0)
            # Closest to half the gap is best; a shift outside (0, gap) improves nothing.
            if 0 < shift < gap and abs(2 * shift - gap) < abs(2 * best_shift - gap):
                best_shift, best_give, best_take = shift, give, take
    if best_give < 0:
        return False
    labels[best_give] = light
    if best_take >= 0:
        labels[best_take] = heavy
    loads[heavy] -= best_shift
    loads[light] += best_shift
    return True
