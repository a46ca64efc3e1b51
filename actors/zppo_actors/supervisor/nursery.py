"""The supervisor's side of the nursery (`zppo_actors.nursery`): which actors are forked, when, and
what is left to do when that fails: they are spawned, as all others are.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import msgspec

from zppo.plan.processes import ProcessEntry
from zppo.signals import take_orphans
from zppo_actors.nursery import LONGEST_MESSAGE, READY, ROOM, Request
from zppo_actors.supervisor.children import Adopted, Birth, Child, child_of, reap_orphans, spawn

NAME = "nursery"
FEWEST = 2
"""One actor alone would start no sooner."""
ANSWER_SECONDS = 30.0
"""A nursery that was asked for an actor and says nothing for so long is ended."""

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
    """One nursery. It loads until `settled`, which is when `child` may be forgotten."""

    def __init__(self, log_file: Path, env: Mapping[str, str], parent_fd: int) -> None:
        take_orphans()
        self._socket, ear = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._ready = False
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
    def settled(self) -> bool:
        """Whether it is ready, or has ended without ever being so."""
        if not self._ready and not self.child.ended:
            try:
                self._ready = self._socket.recv(len(READY)) == READY
            except BlockingIOError:
                return False
            self._socket.settimeout(ANSWER_SECONDS)
        return True

    def fork(self, command: Sequence[str], **birth: Unpack[Birth]) -> Child | None:
        """A new actor, or None: the nursery has ended, or does not answer and is ended."""
        request = Request(list(command), dict(birth["env"]), str(birth["log"]))
        try:
            self._socket.send(msgspec.msgpack.encode(request))
            answer = self._socket.recv(LONGEST_MESSAGE)
        except OSError:  # a timeout among them, and a socket that was closed
            answer = b""
        if not answer.isdigit():
            self.close()  # whoever is still to say who it is meets a closed socket, and ends
            log.warning("the nursery is gone; %s is started without it", birth["name"])
            return None
        return child_of(Adopted(int(answer)), birth)

    def reap_orphans(self, others: Collection[Child]) -> None:
        """Let go of the orphans that come to us because there is a nursery; `others` are the
        supervisor's other children."""
        living = [child for child in (self.child, *others) if not child.ended]
        reap_orphans([child.process.pid for child in living])

    def close(self) -> None:
        """End the nursery; what was forked from it lives on. May be called again."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self.child.kill()
