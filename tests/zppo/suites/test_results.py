"""Averages that name what they lack, and paired differences, against NumPy."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.errors import UserError
from zppo.suites.intervals import BLOCK, FEW, RESAMPLES, SEED, Z, paired, wilson
from zppo.suites.results import (
    Column,
    RowResult,
    Trouble,
    average,
    difference,
    family_difference,
    folder_name,
    read_column,
    read_result,
    write_result,
)
from zppo.suites.table import Decoding, Row, Suite

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30)


def result(short: str, *scores: float) -> RowResult:
    return RowResult(
        short=short, settings={}, harness="lm-eval 0.4.13",
        scores={f"q{i}": score for i, score in enumerate(scores)},
        judged=0, unboxed=0, cut_off=0, refused=0, tokens=None, seconds=1.0, asked=len(scores),
    )  # fmt: skip


def rows(*shorts: str, family: str = "LLM") -> list[Row]:
    return [
        Row(short=short, family=family, harness="lm-eval", scoring="E+J", task=["t"])
        for short in shorts
    ]


def column(*results: RowResult, label: str = "m") -> Column:
    return Column(label=label, results={one.short: one for one in results}, missing={})


def test_a_missing_row_is_named_and_is_in_no_average() -> None:
    table = [*rows("A", "B", "C"), *rows("V", family="VLM")]
    one = average("LLM", table, column(result("A", 1.0, 1.0), result("C", 0.0, 1.0)))
    assert (one.value, one.have, one.of, one.missing) == (0.75, 2, 3, ["B"])
    none = average("VLM", table, column())
    assert (none.value, none.low, none.have, none.of) == (None, None, 0, 1)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_the_limits_of_a_score_are_where_it_would_be_just_improbable(scores: list[float]) -> None:
    """Wilson's definition: the shares p from which the mean seen is z standard errors away."""
    found = wilson(scores)
    for limit in (found.low, found.high):
        error = np.sqrt(limit * (1 - limit) / len(scores))
        assert abs(found.value - limit) == pytest.approx(Z * error, abs=1e-9)
    assert found.low <= found.value <= found.high and found.low < found.high


@given(SCORES, SCORES)
def test_an_average_by_numpy(a: list[float], b: list[float]) -> None:
    one = average("LLM", rows("A", "B"), column(result("A", *a), result("B", *b)))
    parts = [wilson(a), wilson(b)]
    mean = (np.mean(a) + np.mean(b)) / 2
    assert one.value == pytest.approx(mean)
    below = np.linalg.norm([part.value - part.low for part in parts]) / 2
    above = np.linalg.norm([part.high - part.value for part in parts]) / 2
    assert one.low == pytest.approx(max(0.0, mean - below))
    assert one.high == pytest.approx(min(1.0, mean + above))


def test_a_difference_is_paired_by_question() -> None:
    """Against a bootstrap that draws questions one by one."""
    generator = np.random.default_rng(3)
    ours, theirs = generator.integers(0, 2, 80) * 1.0, generator.integers(0, 3, 80) / 2
    found = difference(result("A", *ours), result("A", *theirs))
    gaps = ours - theirs
    means = gaps[generator.integers(0, 80, (20_000, 80))].mean(axis=1)
    assert found is not None and found.questions == 80
    assert found.value == pytest.approx(gaps.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert difference(result("A", *ours), result("A", *theirs)) == found, "a fixed seed"


@pytest.mark.parametrize("distinct", [FEW + 1, 150])
def test_many_distinct_differences_are_drawn_one_by_one(distinct: int) -> None:
    """Against a loop with the same numbers, question by question."""
    values = np.random.default_rng(5).uniform(-1, 1, distinct).tolist()
    drawn = np.random.default_rng(SEED)
    means = []
    for _ in range(RESAMPLES):
        chosen = [values[i] for i in drawn.integers(len(values), size=len(values))]
        means.append(math.fsum(chosen) / len(values))
    low, high = np.percentile(means, [2.5, 97.5])
    found = paired([values])
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.value == pytest.approx(math.fsum(values) / len(values), abs=1e-9)


def test_few_distinct_differences_are_drawn_by_their_counts() -> None:
    """The numbers of one multinomial draw a resample, however many are drawn at once."""
    values = [0.0] * 500 + [1.0] * 300 + [-1.0] * 200
    drawn = np.random.default_rng(SEED)
    counts = [drawn.multinomial(1000, [0.2, 0.5, 0.3]) for _ in range(RESAMPLES)]
    low, high = np.percentile([(plus - minus) / 1000 for minus, _, plus in counts], [2.5, 97.5])
    found = paired([values])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("distinct", [5, 1_000, 20_000])
def test_memory_of_a_difference_does_not_grow_with_resamples_times_values(distinct: int) -> None:
    values = (np.arange(20_000) % distinct / distinct).tolist()
    tracemalloc.start()
    try:
        found = paired([values])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.low < found.value < found.high
    assert peak < 40 * BLOCK


def test_the_interval_of_a_difference_covers() -> None:
    """In 95 % of many made pairs the true difference lies within, unlike with unpaired ones."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        hard = generator.random(200)
        one = (generator.random(200) < hard).astype(float)
        other = (generator.random(200) < np.clip(hard - 0.1, 0, 1)).astype(float)
        found = difference(result("A", *one), result("A", *other))
        truth = 0.1 - 0.1**2 / 2  # E[h] - E[max(h - 0.1, 0)] for uniform h
        assert found is not None
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_only_questions_and_rows_of_both_are_compared() -> None:
    ours, theirs = result("A", 1.0, 1.0, 1.0), result("A", 0.0, 1.0)
    assert difference(ours, theirs) is not None
    assert difference(ours, theirs).questions == 2  # type: ignore[union-attr]
    table = rows("A", "B")
    found = family_difference("LLM", table, column(ours, result("B", 1.0)), column(theirs))
    assert found is not None and (found.benchmarks, found.value) == (1, 0.5)
    assert family_difference("VLM", table, column(ours), column(theirs)) is None


def test_a_result_takes_the_place_of_the_trouble(tmp_path: Path) -> None:
    suite = Suite(name="s", folder="", decoding=Decoding(), rows=rows("A", "B"))
    folder = tmp_path / "m" / "rows" / "A"
    folder.mkdir(parents=True)
    write_result(folder, Trouble(reason="it broke"))
    assert read_column(tmp_path, "m", suite).missing == {"A": "it broke", "B": "not run yet"}
    write_result(folder, result("A", 1.0))
    again = read_column(tmp_path, "m", suite)
    assert (again.results, again.missing) == ({"A": result("A", 1.0)}, {"B": "not run yet"})


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError) as error:
        read_result(tmp_path)
    assert str(error.value) == (
        f"--out: {str(tmp_path / 'result.json')!r} is no result of this version (Object missing "
        "required field `short`); remove it"
    )


@given(st.text(min_size=1, max_size=40))
def test_a_label_is_one_folder_and_no_way_out(label: str) -> None:
    name = folder_name(label)
    assert name and "/" not in name and not name.startswith(".") and "\0" not in name
