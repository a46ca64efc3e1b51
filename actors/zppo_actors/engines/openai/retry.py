"""When a request that failed is tried again: a budget for all requests, growing pauses with jitter,
a server's wish.

Invariant: retries can never outnumber the budget plus a tenth of the requests that worked, however
long the run and however broken the server, and no request starts earlier than the server asked for.
"""

from __future__ import annotations

import asyncio
import random
import time
from email.utils import parsedate_to_datetime

REFUND = 0.1
"""What a request that worked gives back to the budget."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0


class RequestFailed(Exception):
    """A request did not work. `retry_after` is the pause in seconds that the server asked for, if
    it did."""

    def __init__(self, reason: str, *, retryable: bool, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retryable = retryable
        self.retry_after = retry_after


class RetryBudget:
    """Retries in hand, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = float(limit)
        self._left = float(limit)

    def take(self) -> bool:
        """Take one retry; False if there is none left."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def worked(self) -> None:
        self._left = min(self._limit, self._left + REFUND)


class Pauses:
    """The pauses of all requests to one server. `first_seconds` is the longest pause before the
    first retry."""

    def __init__(
        self, first_seconds: float = FIRST_PAUSE_SECONDS, generator: random.Random | None = None
    ) -> None:
        self._first = first_seconds
        self._random = generator or random.Random()
        self._not_before = 0.0

    def seconds(self, retries: int) -> float:
        """A pause after so many retries: uniform from 0 to a bound that doubles (full jitter)."""
        bound = min(LONGEST_PAUSE_SECONDS, self._first * 2.0 ** min(retries, 30))
        return self._random.uniform(0.0, bound)

    def ask_for(self, seconds: float) -> None:
        """The server wants no request, of whomever, for so long."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    async def wait(self, seconds: float, until: float) -> bool:
        """Wait so long, and as long as the server wants. False if `until` (monotonic) came
        first."""
        now = time.monotonic()
        start = now + seconds
        if start < self._not_before:
            start = self._not_before + self.seconds(0)  # not all at the same moment
        await asyncio.sleep(max(0.0, min(start, until) - now))
        return start <= until


def retry_after(value: str | None, now: float) -> float:
    """Seconds that a `Retry-After` header asks for, given as seconds or as a date; 0 if it cannot
    be read.

    `now` is the time of day in seconds since the epoch (RFC 9110, section 10.2.3).
    """
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError, OSError):
        return 0.0
