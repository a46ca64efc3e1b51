"""The process that `zppo join` becomes: waits for its key file, then is the host's agent."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from zppo.errors import EXIT_INTERRUPTED, UserError
from zppo.plan.fingerprint import fingerprint
from zppo.signals import Interrupts, die_with_parent, keep_exit_codes
from zppo_actors import runtime
from zppo_actors.hosts.agent import Agent
from zppo_actors.own_time import Patience
from zppo_actors.process import start_log
from zppo_actors.supervisor.gathering import LIMITS
from zppo_protocol import keys
from zppo_protocol.sockets import Dealer

TICK_SECONDS = 0.2

log = logging.getLogger("zppo.host")


def main(argv: Sequence[str]) -> int:
    """Be the agent as `--key FILE --wait SECONDS`; returns its exit code. Raises UserError or
    AccessError where this host cannot take part."""
    parser = argparse.ArgumentParser(
        prog="python -m zppo_actors host", description="The agent of one further host of a run."
    )
    parser.add_argument("--key", required=True, type=Path, metavar="FILE")
    parser.add_argument("--wait", required=True, type=float, metavar="SECONDS")
    parser.add_argument("--tied", action="store_true", help="end with the parent process")
    asked = parser.parse_args(argv)
    if asked.tied:
        die_with_parent(signal.SIGKILL)
    start_log()
    keep_exit_codes()
    for folder in runtime.sweep():
        log.info("removed %s, which a dead run had left", folder)
    interrupts = Interrupts()
    with interrupts.listening():
        if not key_is_there(asked.key, asked.wait, interrupts):
            return EXIT_INTERRUPTED
        credentials = keys.read_credentials(asked.key)
        log.info("this host is %s of the run at %s", credentials.name, credentials.address)
        lines = Lines(asked.key)
        return Agent(credentials.name, lines.connect, asked.wait, interrupts, check_folders).run()


class Lines:
    """Lines to the supervisor, one after the other, with the key of a file. The file is read anew
    for each: that of a run that was killed is replaced by the next run's. It is locked while its
    line is used, because two agents of one host would take its place from each other for ever."""

    def __init__(self, key: Path) -> None:
        self._key = key
        self._lock: int | None = None

    def connect(self) -> Dealer:
        """A new line; the one before is closed. Raises AccessError for a key that cannot be used,
        UserError if another agent uses it."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = locked(self._key)
        return Dealer(keys.read_credentials(self._key), LIMITS)


def locked(key: Path) -> int | None:
    """The descriptor that locks a key file; None where the file system has no locks. Raises
    UserError if another process has locked it."""
    try:
        descriptor = os.open(key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # whoever reads it says why
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"zppo join: --key {str(key)!r} is used by another zppo join; expected one for each "
            "host, with that host's own file"
        ) from None
    except OSError:
        log.info("%s cannot be locked: see to it that only one zppo join uses it", key)
    return descriptor


def key_is_there(path: Path, seconds: float, interrupts: Interrupts) -> bool:
    """Wait for the key file; False when interrupted. Raises UserError after `seconds`."""
    patience = Patience(seconds)
    while not path.exists():
        if interrupts.count:
            return False
        if patience.over:
            raise UserError(
                f"zppo join: --key {str(path)!r} was not there within {seconds:g} s; expected the "
                "file that zppo launch writes for this host"
            )
        time.sleep(TICK_SECONDS)
    return True


def check_folders(folders: Mapping[str, str]) -> None:
    """Raise UserError for a model folder that is missing on this host, or is another model."""
    for path, expected in folders.items():
        try:
            found = fingerprint(Path(path))
        except OSError as error:
            raise UserError(
                f"the model folder {path!r} cannot be read on this host ({error.strerror}); "
                "expected the same folder as on the controller's host, under the same path"
            ) from None
        if found != expected:
            raise UserError(
                f"the model folder {path!r} of this host holds another model than that of the "
                "controller's host; expected a copy of it"
            )
