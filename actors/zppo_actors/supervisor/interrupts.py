"""Ctrl-C and SIGTERM as a count that a loop looks at: once asks for an orderly end, twice for the
end at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TICK_SECONDS = 0.1


class Interrupts:
    """Counts Ctrl-C and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._count) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Wait until `seconds` have passed or an interrupt has come; says whether one has."""
        deadline = time.monotonic() + seconds
        while not self.count and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
        return self.count > 0

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
