"""A clock that stands still while its process does."""

from __future__ import annotations

import pytest

from zppo_actors.own_time import MOST_SECONDS, OwnTime, Patience


def test_a_standstill_counts_for_little_and_everything_else_in_full() -> None:
    real = [1000.0]
    own = OwnTime(lambda: real[0])
    begun = own.now()
    for pause in (0.1, 3.0, MOST_SECONDS, 86_400.0, 0.1):
        real[0] += pause
        last = own.now()
    assert last - begun == pytest.approx(0.1 + 3.0 + MOST_SECONDS + MOST_SECONDS + 0.1)


def test_patience_is_over_after_so_many_seconds_that_were_lived_through() -> None:
    real = [1000.0]
    patience = Patience(MOST_SECONDS + 6.0, lambda: real[0])
    over = []
    for pause in (5.0, 86_400.0, 0.5, 1.0):
        real[0] += pause
        over.append(patience.over)
    assert over == [False, False, False, True]
