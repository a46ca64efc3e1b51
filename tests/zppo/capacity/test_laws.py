"""Estimates of distributions, from samples of known ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.capacity.laws import VALUES, accuracy_law, lengths_law, within_groups


@settings(max_examples=20, deadline=None)
@given(shared=st.floats(0.0, 0.95), size=st.integers(2, 16), seed=st.integers(0, 1000))
def test_the_part_of_the_question_is_found(shared: float, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(600), size)
    values = np.sqrt(shared) * rng.normal(size=600)[groups]
    values += np.sqrt(1.0 - shared) * rng.normal(size=len(groups))
    assert within_groups(values, groups) == pytest.approx(shared, abs=0.12)
    lengths = np.maximum(1, np.exp(4.0 + values).astype(int))
    law = lengths_law([str(group) for group in groups], lengths.tolist())
    assert law.of_question == pytest.approx(shared, abs=0.12)


def test_nothing_is_shared_where_nothing_differs_or_nobody_has_two() -> None:
    assert within_groups(np.ones(6), np.repeat([0, 1], 3)) == 0.0
    assert within_groups(np.arange(3.0), np.arange(3)) == 0.0
    assert within_groups(np.arange(3.0), np.zeros(3, int)) == 0.0


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=400))
def test_the_values_are_quantiles(lengths: list[int]) -> None:
    law = lengths_law(["q"] * len(lengths), lengths)
    real = sorted(max(1, length) for length in lengths)
    assert list(law.values) == sorted(law.values) and set(law.values) <= set(real)
    assert len(law.values) == min(len(lengths), VALUES)
    for share in (0.25, 0.5, 0.75):
        below = sum(length <= np.quantile(law.values, share) for length in real) / len(real)
        assert below >= share - 2.0 / len(law.values)


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0.2, 5.0), beta=st.floats(0.2, 5.0), seed=st.integers(0, 1000))
def test_accuracies_are_those_of_the_beta_binomial(alpha: float, beta: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(8, rng.beta(alpha, beta, size=4000))
    law = accuracy_law(drawn.tolist(), [8] * 4000)
    mean, true = law.alpha / (law.alpha + law.beta), alpha / (alpha + beta)
    assert mean == pytest.approx(true, abs=0.03)
    shared, real = 1 / (law.alpha + law.beta + 1), 1 / (alpha + beta + 1)
    assert shared == pytest.approx(real, abs=0.06)


@pytest.mark.parametrize("right", [0, 8])
def test_questions_that_are_all_alike(right: int) -> None:
    assert accuracy_law([right] * 4, [8] * 4).values == (right / 8,)
