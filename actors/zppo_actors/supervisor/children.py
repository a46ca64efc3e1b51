"""Child processes: spawned in a session of their own, logged to a file, ended together with all
that they spawned."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

TAIL_LINES = 15
TAIL_BYTES = 16_384


class Process(Protocol):
    """What `subprocess.Popen` gives of a process."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Adopted:
    """A child of this process that it has not started itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once there is one."""
        while (exit_code := self._reap(0)) is None:
            pass
        return exit_code

    def _reap(self, options: int) -> int | None:
        if self._exit_code is None:
            pid, status = os.waitpid(self.pid, options)
            self._exit_code = os.waitstatus_to_exitcode(status) if pid else None
        return self._exit_code


@dataclass(frozen=True)
class Child:
    """One living or ended process. `incarnation` counts how often its actor was started, from 0."""

    name: str
    role: str
    incarnation: int
    process: Process
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


class Birth(TypedDict):
    """What a process is started with, beside its command line. `env` is added to our own."""

    name: str
    role: str
    incarnation: int
    log: Path
    env: Mapping[str, str]


def spawn(command: Sequence[str], *, inherited: Sequence[int], **birth: Unpack[Birth]) -> Child:
    """Start `command` with no stdin and its output appended to `log`; of all other descriptors only
    those `inherited` are.

    A session of its own keeps the terminal's Ctrl-C away from it and lets `Child.kill` reach its
    own children.
    """
    with birth["log"].open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **birth["env"]},
            pass_fds=inherited,
            start_new_session=True,
        )
    return child_of(process, birth)


def child_of(process: Process, birth: Birth) -> Child:
    """The child that this process is."""
    return Child(
        name=birth["name"],
        role=birth["role"],
        incarnation=birth["incarnation"],
        process=process,
        log=birth["log"],
    )


def reap_orphans(own: Collection[int]) -> None:
    """Let go of the processes that were given to this one when their parents ended, as
    `zppo.signals.take_orphans` asks for, and that have ended too: all but our `own`."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in own:
                return  # whoever asks for its exit code is to have it
            os.waitpid(found.si_pid, 0)


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log that are not empty; nothing if there is no such file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]
