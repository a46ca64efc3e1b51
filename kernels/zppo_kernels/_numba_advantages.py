"""The compiled loop of `group_advantages` for CPUs: sums in float64."""

from __future__ import annotations

import numpy as np

from ._numba import compiled

(NORM_WITHOUT_ZERO, NORM_WITH_ZERO, CENTER_ONLY, GRPO, GRPO_BESSEL, RLOO, BATCH) = range(7)
"""Places of the modes in `advantages.AdvantageMode`."""


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
    """Advantages of all rollouts; `mean` and `std`, which A' is shifted and scaled by, count only
    where `given`."""
    rollouts = len(rewards_R)
    count_G, sum_G, square_G = np.zeros(rollouts), np.zeros(rollouts), np.zeros(rollouts)
    low_G, high_G = np.full(rollouts, np.inf), np.full(rollouts, -np.inf)
    centred_R = np.zeros(rollouts)
    for row in range(rollouts):
        group, reward = group_ids_R[row], rewards_R[row]
        count_G[group] += 1
        sum_G[group] += reward
        low_G[group] = min(low_G[group], reward)
        high_G[group] = max(high_G[group], reward)
    for row in range(rollouts):
        group = group_ids_R[row]
        if low_G[group] != high_G[group]:
            centred_R[row] = rewards_R[row] - sum_G[group] / count_G[group]
        square_G[group] += centred_R[row] * centred_R[row]
    if not given and mode == BATCH:
        mean, std = 0.0, _moments(rewards_R.astype(np.float64), np.ones(rollouts), 1.0)[1]
    elif not given and mode in (NORM_WITHOUT_ZERO, NORM_WITH_ZERO):
        kept_R = np.ones(rollouts)
        for row in range(rollouts):
            group = group_ids_R[row]
            if mode == NORM_WITHOUT_ZERO and low_G[group] == high_G[group]:
                kept_R[row] = 0.0
        mean, std = _moments(centred_R, kept_R, 0.0)
    for row in range(rollouts):
        group = group_ids_R[row]
        centred, count = centred_R[row], count_G[group]
        if low_G[group] == high_G[group]:
            advantages_R[row] = 0.0
        elif mode == CENTER_ONLY:
            advantages_R[row] = centred
        elif mode == RLOO:
            advantages_R[row] = centred * count / (count - 1)
        elif mode == GRPO:
            advantages_R[row] = centred / (np.sqrt(square_G[group] / count) + eps)
        elif mode == GRPO_BESSEL:
            advantages_R[row] = centred / (np.sqrt(square_G[group] / (count - 1)) + eps)
        else:
            advantages_R[row] = (centred - mean) / (std + eps)


@compiled()
def _moments(values_R: np.ndarray, kept_R: np.ndarray, less: float) -> tuple[float, float]:
    """Mean and std of the values where `kept_R` is 1, with their number minus `less` in the
    denominator of the variance; 0 where there are too few."""
    kept, total, squares = 0.0, 0.0, 0.0
    for row in range(len(values_R)):
        kept += kept_R[row]
        total += kept_R[row] * values_R[row]
    mean = total / kept if kept else 0.0
    for row in range(len(values_R)):
        squares += kept_R[row] * (values_R[row] - mean) ** 2
    return mean, np.sqrt(squares / (kept - less)) if kept > less else 0.0
