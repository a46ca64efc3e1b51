"""The supervisor's side of the nursery (`zppo_actors.nursery`): which actors are forked, when, and
what is left to do when that fails: they are spawned, as all others are.

Consumes `READY` and the process id of each actor. Produces one `Request` an actor, in the order in
which they were asked for. Waits for nothing; the supervisor looks in between two other things.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import msgspec

from zppo.plan.processes import ProcessEntry
from zppo.signals import take_orphans
from zppo_actors.nursery import LONGEST_MESSAGE, READY, ROOM, Request
from zppo_actors.own_time import OwnTime
from zppo_actors.supervisor.children import Adopted, Birth, Child, child_of, reap_orphans, spawn

NAME = "nursery"
FEWEST = 2
"""One actor alone would start no sooner."""
ANSWER_SECONDS = 30.0
"""A nursery that is ready, was asked for an actor and says nothing for so long of the
supervisor's own time is ended."""

log = logging.getLogger("zppo.supervisor")


def forked(table: Collection[ProcessEntry]) -> list[str]:
    """The names of the actors that a nursery is worth having for: those that run a model with
    transformers in their own process."""
    names = [
        entry.name
        for entry in table
        if entry.role in ("trainer", "rank")
        or (entry.served is not None and entry.served.actor.engine == "transformers")
    ]
    return names if sys.platform == "linux" and len(names) >= FEWEST else []


class Nursery:
    """One nursery, and the actors that are still to come of it."""

    def __init__(self, log_file: Path, env: Mapping[str, str], parent_fd: int) -> None:
        take_orphans()
        self._parent_fd = parent_fd
        self._asked: deque[tuple[Sequence[str], Birth]] = deque()
        self._sent = 0  # so many of the first of them
        self._ready, self._time, self._answer_due = False, OwnTime(), float("inf")
        self._socket, ear = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self.child = spawn(
            [sys.executable, "-P", "-m", "zppo_actors", NAME, str(ear.fileno()), ROOM],
            name=NAME,
            role=NAME,
            incarnation=0,
            log=log_file,
            env=env,
            inherited=(ear.fileno(), parent_fd),
        )
        ear.close()

    @property
    def asked(self) -> list[str]:
        """The names of the actors that are still to come."""
        return [birth["name"] for _, birth in self._asked]

    def ask(self, command: Sequence[str], **birth: Unpack[Birth]) -> None:
        """Let there be this actor; it comes by a later `turn`."""
        self._asked.append((command, birth))

    def turn(self) -> list[Child]:
        """The actors that have come since: forked, or spawned where the nursery has ended or does
        not answer, and is ended."""
        born: list[Child] = []
        while self._asked and self._is_open:
            answer = self._say_and_hear()
            if answer is None:
                break
            if answer == READY:
                self._ready = True
            elif answer.isdigit():
                born.append(child_of(Adopted(int(answer)), self._asked.popleft()[1]))
                self._sent -= 1
                self._answer_due = self._time.now() + ANSWER_SECONDS
            else:
                log.warning("the nursery is gone; %s start without it", ", ".join(self.asked))
                self._end()
        while self._asked and not self._is_open:
            command, birth = self._asked.popleft()
            born.append(spawn(command, **birth, inherited=(self._parent_fd,)))
        return born

    def reap_orphans(self, others: Collection[Child]) -> None:
        """Let go of the orphans that come to us because there is a nursery; `others` are the
        supervisor's other children. One that may be an actor whose process id is still on its way
        is left alone."""
        if not self._sent:
            living = [child for child in (self.child, *others) if not child.ended]
            reap_orphans([child.process.pid for child in living])

    def close(self) -> None:
        """End the nursery, and whatever has not come of it; what has lives on. May be called
        again."""
        self._asked.clear()
        self._end()

    @property
    def _is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def _say_and_hear(self) -> bytes | None:
        """Send the requests that are due and take the next answer: None where there is none yet,
        nothing where there will be none."""
        try:
            while self._ready and self._sent < len(self._asked):
                self._send(*self._asked[self._sent])
            return self._socket.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return b"" if self._time.now() > self._answer_due else None
        except OSError:
            return b""

    def _send(self, command: Sequence[str], birth: Birth) -> None:
        request = Request(list(command), dict(birth["env"]), str(birth["log"]))
        self._socket.send(msgspec.msgpack.encode(request))
        if not self._sent:
            self._answer_due = self._time.now() + ANSWER_SECONDS
        self._sent += 1

    def _end(self) -> None:
        """Whoever is still to say who it is meets a closed socket, and ends; whoever has said it
        unheard is killed."""
        if not self._is_open:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            while answer := self._socket.recv(LONGEST_MESSAGE):
                if answer.isdigit():
                    Adopted(int(answer)).kill()
        self._socket.close()
        self.child.kill()
        self._sent = 0
