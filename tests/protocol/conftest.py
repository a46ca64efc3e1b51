"""What the tests of the wire share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """Register a socket (or process) to be closed at the end, so that a failing test leaves nothing
    behind."""
    things: list[Any] = []

    def register(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield register
    for thing in reversed(things):
        thing.close()
