"""A made-up run for the tests of reports and records."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_run import FakeRun, make_question, make_window

from zppo.algorithm.window import Window


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """`fake_run(steps=12, method="zppo")` writes a made-up run and returns its directory."""

    def write(steps: int = 12, method: str = "zppo") -> Path:
        return FakeRun(tmp_path / f"{method}-{steps}", method).write(steps)

    return write


@pytest.fixture
def window() -> Window:
    """One trained window: two questions, the first hard and reformulated."""
    rng = random.Random(3)
    drawn = [(make_question(rng, 0), "new"), (make_question(rng, 1), "replay")]
    return make_window(rng, 4, drawn, {"q-0000": 0.1, "q-0001": 1.0})
