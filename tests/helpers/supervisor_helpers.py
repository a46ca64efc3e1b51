"""A view that keeps its lines, and processes that play the actors of a run (`stub_actor.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

from zppo.plan.processes import ProcessEntry
from zppo_protocol.messages import Status

STUB = Path(__file__).with_name("stub_actor.py")


class Lines:
    """A view that keeps its lines, and the restarts that it was to show."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.restarts: list[int] = []

    def update(self, status: Status) -> None:
        self.restarts.append(status.counters["restarts"])

    def log(self, line: str) -> None:
        self.lines.append(line)

    def close(self, verdict: str = "") -> None: ...


def stub_command(entry: ProcessEntry) -> list[str]:
    return [sys.executable, "-P", str(STUB), entry.role]
