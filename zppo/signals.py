"""How one process is told that another wants it to end: interrupts as a count that a loop looks at,
what ends a process that was forked, and the kernel's word to a child whose parent has died."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Both from <linux/prctl.h>."""


SAME_SECONDS = 5.0
"""A SIGTERM or SIGHUP so soon after one is the same: where all processes of a run are sent it,
whoever has started this one passes on what it was sent as well, and systemd sends a session that it
ends the one and then the other."""


class Heard:
    """When SIGTERM or SIGHUP was heard last."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def is_new(self) -> bool:
        """Whether one that has come now is another than the last."""
        now = time.monotonic()
        if now - self._last < SAME_SECONDS:
            return False
        self._last = now
        return True


class Interrupts:
    """Counts Ctrl-C, SIGTERM and the loss of the terminal (SIGHUP) while it is entered: once asks
    for an orderly end, twice for the end at once.

    A count, because a handler may run between any two bytecodes of the main thread: what is to
    follow from an interrupt is done by the loop, where nothing is half done.
    """

    def __init__(self) -> None:
        self.count = 0
        self._heard = Heard()

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Under nohup the loss of the terminal is nothing to stop for.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = [signal.signal(number, self._count) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT or self._heard.is_new():
            self.count += 1


def take_for_ctrl_c() -> None:
    """Let SIGTERM and the loss of the terminal (SIGHUP) be a KeyboardInterrupt of the main thread,
    as Ctrl-C is, until this process counts them (`Interrupts`) or handles them otherwise. They end
    what it forks, as ever. What is ignored stays so, as under nohup."""
    heard = Heard()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if heard.is_new():  # one that is passed on must not disturb the end
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
            ends_forks(number)


def ends_forks(number: signal.Signals) -> None:
    """Let the signal `number` end every process that this one forks from now on, although this one
    has a handler for it.

    It is held back for as long as a fork takes: until the child has let go of the handler it would
    run that, and the signal would be lost.
    """
    thread = threading.local()

    def hold() -> None:
        thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, thread.mask)

    def release_child() -> None:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_child)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process the signal `number` when the thread that started it ends.

    Called in the child; a program that it then executes keeps the tie. Only Linux knows such a tie,
    elsewhere this does nothing. A parent that ended before the call goes unnoticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def take_orphans() -> None:
    """Ask the kernel to make every descendant whose own parent has ended a child of this process.
    Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_exit_codes() -> None:
    """Let the kernel keep the exit codes of children until they are asked for. It does so by
    default, but whoever started this process may have had it ignore them (`SIGCHLD`), and that is
    inherited."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
