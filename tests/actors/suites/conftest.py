"""The process of a suite takes signals and the log over, which a test gives back."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def process_wide() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = logging.getLogger("zppo")
    level = log.level
    yield
    log.setLevel(level)
    for number, handler in before.items():
        signal.signal(number, handler)
