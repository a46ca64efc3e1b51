"""The time that a process has lived through: seconds that stand still while the process does.

Whoever was stopped (SIGSTOP, a frozen container, a suspended job) has heard nobody meanwhile, and
those whom it waits for may have been stopped with it. By any other clock everybody's lease is over
the moment it goes on, before it has read what has come.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SECONDS = 10.0
"""Of the time between two looks no more than this counts."""


class OwnTime:
    """For a loop that looks in every round. One thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._lost = clock, clock(), 0.0

    def now(self) -> float:
        """Seconds; only differences mean anything, and only those of one `OwnTime`."""
        found = self._clock()
        self._lost += max(0.0, found - self._last - MOST_SECONDS)
        self._last = found
        return found - self._lost


class Patience:
    """So many seconds of one's own from now on, for a loop that waits and looks in every round.

    Whoever is waited for may have stood still as well, so time that nobody lived through ends no
    wait.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._time = OwnTime(clock)
        self._end = self._time.now() + seconds

    @property
    def over(self) -> bool:
        return self._time.now() > self._end
