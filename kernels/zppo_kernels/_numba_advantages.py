"""The compiled loop of `group_advantages` for CPUs: four passes over the rollouts, sums in
float64."""

from __future__ import annotations

import numpy as np

from ._numba import compiled

NORM_WITHOUT_ZERO, NORM_WITH_ZERO, CENTER_ONLY, GRPO = range(4)


@compiled()
def advantages_rows(
    rewards_R: np.ndarray,
    group_ids_R: np.ndarray,
    mode: int,
    eps: float,
    given: bool,
    mean: float,
    std: float,
    advantages_R: np.ndarray,
) -> None:
    """Advantages of all rollouts; `mean` and `std` count only where `given`."""
    rollouts = len(rewards_R)
    count_G, sum_G, square_G = np.zeros(rollouts), np.zeros(rollouts), np.zeros(rollouts)
    low_G, high_G = np.full(rollouts, np.inf), np.full(rollouts, -np.inf)
    for row in range(rollouts):
        group, reward = group_ids_R[row], rewards_R[row]
        count_G[group] += 1
        sum_G[group] += reward
        low_G[group] = min(low_G[group], reward)
        high_G[group] = max(high_G[group], reward)
    kept, total = 0, 0.0
    for row in range(rollouts):
        group = group_ids_R[row]
        trivial = low_G[group] == high_G[group]
        centred = 0.0 if trivial else rewards_R[row] - sum_G[group] / count_G[group]
        square_G[group] += centred * centred
        if mode == NORM_WITH_ZERO or not trivial:
            kept += 1
            total += centred
    if not given:
        mean = total / kept if kept else 0.0
        squares = 0.0
        for row in range(rollouts):
            group = group_ids_R[row]
            trivial = low_G[group] == high_G[group]
            if mode == NORM_WITH_ZERO or not trivial:
                centred = 0.0 if trivial else rewards_R[row] - sum_G[group] / count_G[group]
                squares += (centred - mean) ** 2
        std = np.sqrt(squares / kept) if kept else 0.0
    for row in range(rollouts):
        group = group_ids_R[row]
        if low_G[group] == high_G[group]:
            advantages_R[row] = 0.0
            continue
        centred = rewards_R[row] - sum_G[group] / count_G[group]
        if mode == CENTER_ONLY:
            advantages_R[row] = centred
        elif mode == GRPO:
            advantages_R[row] = centred / (np.sqrt(square_G[group] / count_G[group]) + eps)
        else:
            advantages_R[row] = (centred - mean) / (std + eps)
