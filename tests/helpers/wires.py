"""The keys of a small run, for tests of sockets, and ports that nobody listens on."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from pathlib import Path
from typing import Any

import zmq

from zppo_protocol import doors, keys
from zppo_protocol.keys import Credentials

ROLES = {"rollout-0": "rollout", "rollout-1": "rollout", "trainer": "trainer"}


FIRST_PORT, PORTS = 12_000, 20_000
"""Below those that the system hands out by itself: nobody gets one of them between the look here and
its use, and no connection that is tried in vain meets itself there."""

_offsets = itertools.count(os.getpid() * 101)  # each process of tests begins elsewhere


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    while True:
        port = FIRST_PORT + next(_offsets) % PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Wire:
    """The keys of one life at one address; `wire["rollout-0"]` are that actor's credentials."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.access, self.credentials = keys.issue(address, ROLES)

    @classmethod
    def of(cls, kind: str, folder: Path) -> Wire:
        ipc = f"ipc://{folder}/controller.sock"
        return cls(ipc if kind == "ipc" else f"tcp://127.0.0.1:{free_port()}")

    def __getitem__(self, name: str) -> Credentials:
        return self.credentials[name]

    def raw_dealer(self, name: str, identity: bytes | None = None) -> zmq.Socket[bytes]:
        """A peer that has a key and no manners."""
        socket = zmq.Context.instance().socket(zmq.DEALER)
        if identity is not None:
            socket.set(zmq.IDENTITY, identity)
        doors.show(socket, self[name])
        return connected(socket, self.address)


def connected(socket: Any, address: str) -> Any:
    socket.set(zmq.LINGER, 0)
    socket.connect(address)
    return socket
