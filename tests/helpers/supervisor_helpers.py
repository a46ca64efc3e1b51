"""A view that keeps its lines, and processes that play the actors of a run (`stub_actor.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

from zppo.plan.processes import ProcessEntry

STUB = Path(__file__).with_name("stub_actor.py")


class Lines:
    """A view that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, status: object) -> None: ...

    def log(self, line: str) -> None:
        self.lines.append(line)

    def close(self, verdict: str = "") -> None: ...


def stub_command(entry: ProcessEntry) -> list[str]:
    return [sys.executable, "-P", str(STUB), entry.role]
