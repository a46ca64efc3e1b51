"""Intervals for few seeds: the percentile bootstrap, paired wherever the seeds are shared.

Every function draws from its own generator with a fixed seed, so the same runs give the same
numbers. An interval is of 95 %. One seed gives a value and no interval. With few seeds a percentile
interval is too narrow (it cannot leave the range of the values it has seen): of normal values it
covers the mean in 50 % of all cases with two seeds, 75 % with three, 85 % with five, 89 % with
eight. The report says so, and differences are judged by Student's t as well.

Shape legend: S seeds (or the pairs of runs that share one), Q held-out questions, K places along a
curve, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

RESAMPLES = 10_000
LEVEL = 0.95
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""0.975 quantiles of Student's t with 1, 2, 3, … degrees of freedom."""


class Interval(Struct, frozen=True):
    """An estimate from `count` seeds; `low` and `high` are None where there are too few for an
    interval."""

    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Mean over seeds. None without a value."""
    values_S = np.asarray(values, dtype=float)
    if not len(values_S):
        return None
    if len(values_S) == 1:
        return Interval(float(values_S[0]), None, None, 1)
    means_B = values_S[_draws(len(values_S))].mean(axis=1)
    return Interval(float(values_S.mean()), *_limits(means_B), len(values_S))


def student_half_width(values: Sequence[float]) -> float | None:
    """Half the width of Student's 95 % interval of the mean; None for fewer than two values.

    It covers what it says for normal values however few they are, and is therefore wide for few.
    """
    values_S = np.asarray(values, dtype=float)
    if len(values_S) < 2:
        return None
    degrees = len(values_S) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.5 / degrees
    return float(quantile * values_S.std(ddof=1) / np.sqrt(len(values_S)))


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> Interval | None:
    """Pooled share Σ parts / Σ wholes over seeds, resampled by seed. None if there is nothing to
    take a share of.

    Resamples without any whole are left out.
    """
    parts_S, wholes_S = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    if wholes_S.sum() <= 0:
        return None
    value = float(parts_S.sum() / wholes_S.sum())
    if len(wholes_S) == 1:
        return Interval(value, None, None, 1)
    draws_BS = _draws(len(wholes_S))
    parts_B, wholes_B = parts_S[draws_BS].sum(axis=1), wholes_S[draws_BS].sum(axis=1)
    shares_B = parts_B[wholes_B > 0] / wholes_B[wholes_B > 0]
    return Interval(value, *_limits(shares_B), len(wholes_S))


def band(values_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Limits of the mean over seeds at each of K places, [K] each. None with fewer than two
    seeds."""
    seeds = len(values_SK)
    if seeds < 2:
        return None
    weights_BS = np.stack([np.bincount(draw, minlength=seeds) for draw in _draws(seeds)]) / seeds
    low, high = np.quantile(weights_BS @ values_SK, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def question_interval(differences: np.ndarray) -> Interval | None:
    """Mean of paired differences [S, Q] with seeds *and* questions resampled, for other seeds and
    other questions.

    With one seed only the questions are resampled. None without a question.
    """
    seeds, questions = differences.shape
    if not seeds or not questions:
        return None
    generator = np.random.default_rng(0)
    means_B = np.empty(RESAMPLES // 5)
    for i in range(len(means_B)):
        weights_S = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
        weights_Q = np.bincount(generator.integers(questions, size=questions), minlength=questions)
        means_B[i] = weights_S @ differences @ weights_Q / (seeds * questions)
    return Interval(float(differences.mean()), *_limits(means_B), seeds)


def _draws(count: int) -> np.ndarray:
    """Which values each resample takes, [B, count]."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _limits(values_B: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
