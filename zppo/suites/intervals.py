"""Intervals of 95 % over the questions of benchmarks.

A score: Wilson's interval (Wilson 1927), which has a width where all answers are right, or all
wrong. It is that of right and wrong answers; where scores lie between 0 and 1 their variance is
smaller, so it is too wide rather than too narrow. Averages of benchmarks add the distances to the
limits in square (Newcombe 1998, "square-and-add"). Differences are paired: bootstrap over the
questions that both models answered, percentile interval, with a fixed seed.

Shape legend: Q questions, K distinct values, B resamples. A block is some of the resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

Z = 1.959964
RESAMPLES, SEED = 10_000, 0
LIMITS = (2.5, 97.5)
FEW, COUNT_COST = 64, 16
"""Of so few distinct values counts are drawn, and of more where a count, which costs as much as so
many questions, is still cheaper."""
BLOCK = 1 << 20
"""Numbers that are drawn at once."""


class Interval(Struct, frozen=True):
    """A mean and its interval."""

    value: float
    low: float
    high: float


def wilson(scores: Sequence[float]) -> Interval:
    """Mean of at least one score from 0 to 1."""
    count, mean = len(scores), sum(scores) / len(scores)
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return Interval(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def mean_of(parts: Sequence[Interval]) -> Interval:
    """The mean of at least one independent mean."""
    count, value = len(parts), sum(part.value for part in parts) / len(parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Interval(value, max(0.0, value - below), min(1.0, value + above))


def paired(differences: Sequence[Sequence[float]]) -> Interval:
    """The mean over benchmarks of the mean of each one's differences, question by question; the
    questions of each are drawn anew."""
    drawn = np.random.default_rng(SEED)
    means_B, value = np.zeros(RESAMPLES), 0.0
    for values in differences:
        means_B += _resampled_means(np.asarray(values, dtype=float), drawn)
        value += sum(values) / len(values)
    low, high = np.percentile(means_B / len(differences), LIMITS)
    return Interval(value / len(differences), float(low), float(high))


def _resampled_means(values_Q: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """Means [B] of Q values that are drawn with replacement: time grows with Q and no faster, and
    memory hardly. Of few distinct values counts are drawn in place of questions."""
    questions = len(values_Q)
    values_K, counts_K = np.unique(values_Q, return_counts=True)
    by_count = len(values_K) <= max(FEW, questions // COUNT_COST)
    rows = max(1, BLOCK // (len(values_K) if by_count else questions))
    means_B = np.empty(RESAMPLES)
    for first in range(0, RESAMPLES, rows):
        block = means_B[first : first + rows]
        if by_count:
            counts_BK = drawn.multinomial(questions, counts_K / questions, len(block))
            block[:] = counts_BK @ values_K / questions
        else:
            places_BQ = drawn.integers(questions, size=(len(block), questions))
            block[:] = values_Q[places_BQ].mean(axis=1)
    return means_B
