"""Intervals against longhand computations: loops over every resample, and cases that can be counted
on paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zppo.comparison import sentences, statistics
from zppo.comparison.statistics import (
    Interval,
    band,
    mean_interval,
    question_interval,
    ratio_interval,
)


def every_resample(count: int) -> list[tuple[int, ...]]:
    """All equally likely resamples of `count` values."""
    return list(itertools.product(range(count), repeat=count))


def exact_quantile(values: list[float], share: float) -> float:
    """The value below which this share of the exact bootstrap distribution lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_the_mean_of_nothing_is_nothing() -> None:
    assert mean_interval([]) is None


def test_one_seed_has_a_value_and_no_interval() -> None:
    assert mean_interval([0.25]) == Interval(0.25, None, None, 1)
    assert not Interval(0.25, None, None, 1).excludes_zero


def test_two_seeds_give_their_own_range() -> None:
    # Each value alone is drawn twice in a quarter of the resamples, so both ends lie beyond 2.5 %.
    assert mean_interval([0.2, 0.6]) == Interval(pytest.approx(0.4), 0.2, 0.6, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [[0.1, 0.5, 0.4], [1.0, 2.0, 4.0, 8.0], [0.3, 0.31, 0.29, 0.5, 0.1]]
)
def test_the_interval_is_that_of_the_exact_bootstrap_distribution(values: list[float]) -> None:
    means = [sum(values[i] for i in draw) / len(draw) for draw in every_resample(len(values))]
    interval = mean_interval(values)
    assert interval is not None and interval.low is not None and interval.high is not None
    assert interval.value == pytest.approx(sum(values) / len(values))
    # The drawn quantile lies between the exact ones of shares a little to either side.
    assert exact_quantile(means, 0.018) <= interval.low <= exact_quantile(means, 0.032)
    assert exact_quantile(means, 0.968) <= interval.high <= exact_quantile(means, 0.982)


def test_the_quantiles_are_those_of_a_loop_over_the_same_draws() -> None:
    values = [0.1, 0.5, 0.4]
    generator = np.random.default_rng(0)
    means = []
    for _ in range(statistics.RESAMPLES):
        draw = generator.integers(3, size=3)
        means.append(sum(values[i] for i in draw) / 3)
    means.sort()
    low = means[249] + 0.975 * (means[250] - means[249])
    interval = mean_interval(values)
    assert interval is not None and interval.low == pytest.approx(low)


def test_the_same_values_give_the_same_interval() -> None:
    assert mean_interval([0.1, 0.5, 0.4]) == mean_interval([0.1, 0.5, 0.4])


def test_an_interval_on_one_side_of_zero() -> None:
    assert Interval(0.2, 0.1, 0.3, 3).excludes_zero
    assert Interval(-0.2, -0.3, -0.1, 3).excludes_zero
    assert not Interval(0.2, -0.1, 0.3, 3).excludes_zero
    assert not Interval(0.2, 0.0, 0.3, 3).excludes_zero


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([1.0], None),
        ([0.0, 2.0], 12.706 * np.sqrt(2) / np.sqrt(2)),
        ([1.0, 2.0, 3.0], 4.303 * 1.0 / np.sqrt(3)),
        ([0.0, 1.0] * 20, (1.96 + 2.5 / 39) * np.sqrt(10 / 39) / np.sqrt(40)),
    ],
)
def test_students_interval(values: list[float], half: float | None) -> None:
    assert statistics.student_half_width(values) == (None if half is None else pytest.approx(half))


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_stated_coverage_is_that_of_simulated_runs(seeds: int) -> None:
    """How often the bootstrap covers the true mean of normal values, as the report says."""
    generator = np.random.default_rng(1)
    worlds, draws = (
        generator.normal(size=(600, seeds)),
        generator.integers(seeds, size=(600, seeds)),
    )
    low, high = np.quantile(worlds[:, draws].mean(axis=2), [0.025, 0.975], axis=1)
    covered = 100 * float(((low <= 0) & (high >= 0)).mean())
    assert covered == pytest.approx(sentences.COVERAGE[seeds], abs=6)


def test_a_share_is_pooled_and_not_a_mean_of_shares() -> None:
    interval = ratio_interval([1, 9], [10, 30])
    assert interval is not None
    assert interval.value == 10 / 40
    assert (interval.low, interval.high) == (1 / 10, 9 / 30)


def test_a_share_of_nothing_is_nothing() -> None:
    assert ratio_interval([], []) is None
    assert ratio_interval([0, 0], [0, 0]) is None


def test_a_share_of_one_seed_has_no_interval() -> None:
    assert ratio_interval([1], [4]) == Interval(0.25, None, None, 1)


def test_resamples_without_a_whole_are_left_out() -> None:
    interval = ratio_interval([0, 2, 0], [0, 4, 0])
    assert interval == Interval(0.5, 0.5, 0.5, 3)


def test_a_band_is_the_interval_at_every_place() -> None:
    values_SK = np.array([[0.1, 1.0, 5.0], [0.5, 2.0, 5.0], [0.4, 4.0, 5.0]])
    limits = band(values_SK)
    assert limits is not None
    for place in range(3):
        interval = mean_interval(values_SK[:, place].tolist())
        assert interval is not None
        assert limits[0][place] == pytest.approx(interval.low)
        assert limits[1][place] == pytest.approx(interval.high)
    assert (limits[0][2], limits[1][2]) == (pytest.approx(5.0), pytest.approx(5.0))


def test_a_band_needs_two_seeds() -> None:
    assert band(np.ones((1, 4))) is None


def test_questions_are_resampled_even_with_one_seed() -> None:
    differences = np.array([[1.0] * 10 + [0.0] * 30])
    interval = question_interval(differences)
    assert interval is not None and interval.low is not None and interval.high is not None
    assert interval.value == 0.25
    # The mean of 40 draws of a coin with p = 0.25: standard error sqrt(.25 * .75 / 40) = 0.068.
    assert interval.low == pytest.approx(0.25 - 1.96 * 0.068, abs=0.03)
    assert interval.high == pytest.approx(0.25 + 1.96 * 0.068, abs=0.03)


def test_seeds_widen_the_interval_over_questions() -> None:
    same = question_interval(np.tile([1.0, 0.0, 0.0, 0.0], (4, 10)))
    apart = question_interval(np.array([[1.0] * 40, [0.0] * 40, [0.0] * 40, [0.0] * 40]))
    assert same is not None and apart is not None and same.value == apart.value == 0.25
    assert same.high is not None and apart.high is not None and apart.high > same.high + 0.2


def test_no_question_gives_no_interval() -> None:
    assert question_interval(np.zeros((0, 0))) is None
    assert question_interval(np.zeros((2, 0))) is None
