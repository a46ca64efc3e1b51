"""How the parts around the models grow, against the baseline: no count of calls and no peak of memory
is 30 % above it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "benches/growth.py"


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growth"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_nothing_has_grown_above_its_baseline(growth: ModuleType) -> None:
    baseline = json.loads(growth.BASELINE.read_text())
    found = growth.measure_all(small=True)
    assert growth.grown(found, baseline) == []
    assert growth.page(found).count("| scheduler: ") == 2


@pytest.mark.slow
def test_what_has_grown_is_named(growth: ModuleType) -> None:
    found = {"report": {8: growth.Measured(1301, 1299, 0.1)}}
    assert growth.grown(found, {"report": {"8": {"calls": 1000, "peak_bytes": 1000}}}) == [
        "report 8: calls 1,301, the baseline is 1,000"
    ]
    assert growth.grown(found, {"report": {"8": {"calls": 1301}}}) == [
        "report 8: peak_bytes has no baseline"
    ]


@pytest.mark.slow
def test_only_calls_of_ours_are_counted(growth: ModuleType) -> None:
    """Twice the rows are twice the calls; what the test itself does is none."""
    counts = [growth.count_calls(growth.corpus(rows)) for rows in (100, 200)]
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.05)
    assert growth.count_calls(lambda: sorted(str(i) for i in range(1000))) == 0
