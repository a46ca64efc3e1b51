"""Child processes: spawned in a session of their own, logged to a file, ended together with all
that they spawned."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 15
TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Child:
    """One living or ended process. `incarnation` counts how often its actor was started, from 0."""

    name: str
    role: str
    incarnation: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def exit_code(self) -> int:
        """Exit code of the ended process; negative for a signal."""
        return self.process.wait()

    @property
    def verdict(self) -> str:
        """How the process ended, in words."""
        if self.exit_code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.exit_code).name}"
        if self.exit_code == 0:
            return f"{self.name} left without being told to"
        return f"{self.name} ended with exit code {self.exit_code}"

    def kill(self) -> None:
        """Kill the process and everything in its session, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def spawn(
    command: Sequence[str],
    *,
    name: str,
    role: str,
    incarnation: int,
    log: Path,
    env: Mapping[str, str],
    parent_fd: int,
) -> Child:
    """Start `command` with no stdin and its output appended to `log`; only `parent_fd` is
    inherited.

    A session of its own keeps the terminal's Ctrl-C away from it and lets `Child.kill` reach its
    own children.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            pass_fds=(parent_fd,),
            start_new_session=True,
        )
    return Child(name=name, role=role, incarnation=incarnation, process=process, log=log)


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log that are not empty; nothing if there is no such file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]
