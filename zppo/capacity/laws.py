"""Distributions of lengths and accuracies from samples, what the simulator draws from; and the line
through a trainer's steps.

Shape legend: R responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from zppo.simulation import Accuracies, Lengths, TrainerSpeed

VALUES = 100
"""Lengths that a distribution is kept as, at most: its quantiles of equal distance."""
LEAST_CORRELATION, MOST_CORRELATION = 1e-3, 1.0 - 1e-3
"""of the answers to one question; a Beta distribution has no others"""
LEAST_SLOPE = 1e-3
"""Least share of a step's time that is laid to its tokens: a trainer has a finite speed."""


def lengths_law(questions_R: Sequence[str], lengths_R: Sequence[int]) -> Lengths:
    """The distribution of lengths, with the part of its variance that belongs to the question. An
    empty response counts as one token, because it takes a step."""
    lengths = np.maximum(np.asarray(lengths_R), 1)
    quantiles = np.sort(lengths)
    if len(quantiles) > VALUES:
        places = (np.arange(VALUES) + 0.5) / VALUES
        quantiles = np.quantile(lengths, places, method="nearest")
    _, groups_R = np.unique(np.asarray(questions_R), return_inverse=True)
    return Lengths(
        values=tuple(int(length) for length in quantiles),
        of_question=round(within_groups(_normal_scores(lengths), groups_R), 4),
    )


def within_groups(values_R: np.ndarray, groups_R: np.ndarray) -> float:
    """Intraclass correlation of values in groups by a one-way analysis of variance (Shrout and
    Fleiss 1979, ICC(1)), at least 0. 0 where every group has one value, or all are equal."""
    sizes = np.bincount(groups_R).astype(float)
    groups, total = len(sizes), float(sizes.sum())
    if groups < 2 or total <= groups:
        return 0.0
    means = np.bincount(groups_R, values_R) / sizes
    between = float((sizes * (means - values_R.mean()) ** 2).sum()) / (groups - 1)
    inside = float(((values_R - means[groups_R]) ** 2).sum()) / (total - groups)
    size = (total - float((sizes**2).sum()) / total) / (groups - 1)
    whole = between + (size - 1.0) * inside
    return min(1.0, max(0.0, (between - inside) / whole)) if whole > 0.0 else 0.0


def accuracy_law(correct: Sequence[int], sizes: Sequence[int]) -> Accuracies:
    """The Beta distribution of questions' accuracies, from right answers in groups of these sizes:
    method of moments for the beta-binomial, whose answers to one question correlate by
    1 / (alpha + beta + 1)."""
    n, right = np.asarray(sizes, float), np.asarray(correct, float)
    mean = float(right.sum() / n.sum())
    if mean in (0.0, 1.0):
        return Accuracies(values=(mean,))
    size = float(n.mean())
    variance = float(((right / n - mean) ** 2).mean()) / (mean * (1.0 - mean))
    shared = (variance - 1.0 / size) / (1.0 - 1.0 / size) if size > 1.0 else 0.0
    shared = min(max(shared, LEAST_CORRELATION), MOST_CORRELATION)
    both = 1.0 / shared - 1.0
    return Accuracies(alpha=round(mean * both, 6), beta=round((1.0 - mean) * both, 6))


def skill_after(law: Accuracies, correct: float, size: int) -> float:
    """The expected accuracy of a question of which `correct` of `size` answers were right."""
    if law.values:
        return law.values[0]
    return (law.alpha + correct) / (law.alpha + law.beta + size)


def trainer_speed(
    tokens: Sequence[float], seconds: Sequence[float], publish_seconds: float
) -> TrainerSpeed:
    """The straight line of least squares through the times of steps by their tokens, neither part
    of it negative. At least one step has tokens."""
    x, y = np.asarray(tokens, float), np.asarray(seconds, float)
    spread = x - x.mean()
    slope = float((spread * y).sum() / max(float((spread**2).sum()), 1e-9))
    highest = float(y.mean() / x.mean())
    slope = min(max(slope, LEAST_SLOPE * highest), highest)
    return TrainerSpeed(
        fixed=round(max(0.0, float(y.mean()) - slope * float(x.mean())), 6),
        tokens_per_second=round(1.0 / slope, 3),
        publish_seconds=round(publish_seconds, 6),
    )


def _normal_scores(values_R: np.ndarray) -> np.ndarray:
    """Each value's normal quantile by its rank; equal ones share the middle of theirs."""
    _, inverse, counts = np.unique(values_R, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2.0) / len(values_R)
    normal = NormalDist()
    return np.array([normal.inv_cdf(share) for share in middle])[inverse]
