"""Slow file work of the controller, in order, on one thread, so that it never holds up a
message."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._pending: deque[Future[Any]] = deque()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Run `work(*arguments)` after everything submitted before."""
        self._pending.append(self._executor.submit(work, *arguments))

    @property
    def idle(self) -> bool:
        return not self._pending

    def check(self) -> None:
        """Raise what went wrong in finished work, so that a full disk ends the run and is not
        overlooked."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def close(self) -> None:
        """Wait for all work; raises what went wrong."""
        self._executor.shutdown(wait=True)
        self.check()
