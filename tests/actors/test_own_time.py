"""A clock that stands still while its process does."""

from __future__ import annotations

import pytest

from zppo_actors.own_time import MOST_SECONDS, OwnTime


def test_a_standstill_counts_for_little_and_everything_else_in_full() -> None:
    real = [1000.0]
    own = OwnTime(lambda: real[0])
    begun = own.now()
    for pause in (0.1, 3.0, MOST_SECONDS, 86_400.0, 0.1):
        real[0] += pause
        last = own.now()
    assert last - begun == pytest.approx(0.1 + 3.0 + MOST_SECONDS + MOST_SECONDS + 0.1)
