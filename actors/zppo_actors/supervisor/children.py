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

from zppo.errors import EXIT_FAILED
from zppo_actors.supervisor.vitals import Children, Usage, usage

TAIL_LINES = 15
TAIL_BYTES = 16_384


class Process(Protocol):
    """A process of the run, of this host or of another. `reason` says why it ended, where its exit
    code does not."""

    reason: str

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        ...

    def wait(self) -> int:
        """The exit code of a process that has ended, or is about to."""
        ...

    def kill(self) -> None:
        """Kill the process and everything in its session."""
        ...

    def used(self, children: Children) -> Usage:
        """What it and its descendants have used so far; `children` are those of this host."""
        ...


class Adopted:
    """A child of this process at the head of a session, whoever has started it.

    Invariant: once it is known to have ended no signal is sent to its number, but at that moment,
    to what it leaves behind: later the number may be that of somebody else."""

    def __init__(self, pid: int) -> None:
        self.pid, self.reason = pid, ""
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        while (exit_code := self._look(0)) is None:
            pass
        return exit_code

    def kill(self) -> None:
        """Kill the session, and reap the process."""
        if self._exit_code is None:
            self._end_session()
            self.wait()

    def used(self, children: Children) -> Usage:
        return usage(self.pid, children)

    def _look(self, options: int) -> int | None:
        if self._exit_code is None:
            self._exit_code = self._reaped(options)
            if self._exit_code is not None:
                self._end_session()
        return self._exit_code

    def _end_session(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _reaped(self, options: int) -> int | None:
        pid, status = os.waitpid(self.pid, options)
        return os.waitstatus_to_exitcode(status) if pid else None


class Spawned(Adopted):
    """A child that this process has started itself."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        super().__init__(popen.pid)
        self._popen = popen  # which reaps it, and warns of none that is collected

    def _reaped(self, options: int) -> int | None:
        return self._popen.poll() if options else self._popen.wait()


class Stillborn:
    """A process that the system would not start: one that has ended at once, and may come about the
    next time."""

    pid = 0

    def __init__(self, error: OSError) -> None:
        self.reason = f"it could not be started ({error.strerror})"

    def poll(self) -> int:
        return EXIT_FAILED

    def wait(self) -> int:
        return EXIT_FAILED

    def kill(self) -> None:
        """There is nothing to kill."""

    def used(self, children: Children) -> Usage:
        return 0.0, 0


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
    def ending(self) -> str:
        """How the process ended, in words."""
        if self.exit_code < 0:
            return f"{self.name} was killed by {name_of_signal(-self.exit_code)}"
        if self.exit_code == 0:
            return f"{self.name} left"
        return f"{self.name} ended with exit code {self.exit_code}"

    @property
    def verdict(self) -> str:
        """How a process ended that nobody has told to, in words."""
        return self.ending + (" without being told to" if self.exit_code == 0 else "")

    @property
    def key(self) -> tuple[str, int]:
        """Tells it from all other children of the attempt."""
        return self.name, self.incarnation

    def kill(self) -> None:
        """Kill the process and everything in its session."""
        self.process.kill()


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
    own children. Where the system is out of processes, files or memory the child has ended already.
    """
    try:
        with birth["log"].open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **birth["env"]},
                pass_fds=inherited,
                start_new_session=True,
            )
    except OSError as error:
        return child_of(Stillborn(error), birth)
    return child_of(Spawned(popen), birth)


def child_of(process: Process, birth: Birth) -> Child:
    """The child that this process is."""
    return Child(
        name=birth["name"],
        role=birth["role"],
        incarnation=birth["incarnation"],
        process=process,
        log=birth["log"],
    )


def name_of_signal(number: int) -> str:
    """`SIGKILL` for 9; not every number has a name, such as those between SIGRTMIN and SIGRTMAX."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def reap_orphans(own: Collection[int]) -> None:
    """Let go of the processes that were given to this one when their parents ended, as
    `zppo.signals.take_orphans` asks for, and that have ended too: all but our `own`, those of whom
    it is not known that they have ended. One of these that has ended just now hides the orphans
    behind it until it was asked for its exit code, and somebody does before the next call."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in own:
                return
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
