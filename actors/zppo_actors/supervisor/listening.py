"""Where the sockets of a run listen. The supervisor binds them before anything is started or told
of a port, and whoever listens inherits its socket: between choice and use nobody can take a
port."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zppo.config.cluster import LOCALHOST
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.placement import bind_address, check_reached, reached_at, transport_kind
from zppo.plan.processes import host_name
from zppo.records.run_directory import SOCKET_NAME
from zppo_actors.own_time import Patience
from zppo_actors.runtime import MEETING_PORT
from zppo_protocol.addresses import TCP, tcp_address

MOST_FILES = 1 << 16
RANKS_PORT = "actors.trainer.port"
LET_GO_SECONDS = 5.0
TRY_SECONDS = 0.1


def raise_file_limit() -> None:
    """As many open files as this user may have, up to `MOST_FILES`, for this process and those that
    it starts. Each connection is one, a stranger's too for as long as it may take to show its key,
    and whoever can open no file any more fails at whatever is next."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class Ear:
    """A socket that listens at the address `bound`, and where others reach it."""

    socket: socket.socket
    bound: str
    reached: str

    @property
    def port(self) -> int:
        """Its TCP port."""
        found: int = self.socket.getsockname()[1]
        return found


@dataclass(frozen=True)
class Ears:
    """The ports of this host that the processes of a run listen on. None: that of the controller is
    a file in its runtime folder; the ranks of the trainer are on one host."""

    controller: Ear | None = None
    ranks: Ear | None = None

    def addresses(self, folder: Path) -> tuple[str, str]:
        """The address of the controller of the attempt in `folder`, and the one at which its actors
        reach it."""
        if self.controller is None:
            unix = f"ipc://{folder / SOCKET_NAME}"
            return unix, unix
        return self.controller.bound, self.controller.reached

    def of(self, role: str) -> list[int]:
        """The descriptors that a process of this role inherits, to listen on: one at most."""
        ear = {"controller": self.controller, "trainer": self.ranks}.get(role)
        return [] if ear is None else [ear.socket.fileno()]

    def hang_up(self) -> None:
        """End all connections that wait to be taken: they are of an attempt that has ended, whose
        keys the controller of the next would take for a stranger's."""
        for ear in filter(None, (self.controller, self.ranks)):
            with contextlib.suppress(OSError):  # BlockingIOError: no more wait
                for _ in range(socket.SOMAXCONN):
                    ear.socket.accept()[0].close()

    def told(self, role: str) -> dict[str, str]:
        """What is added to the environment of a process of this role."""
        if self.ranks is None or role != "rank":
            return {}
        return {MEETING_PORT: str(self.ranks.port)}


@contextlib.contextmanager
def opened(topology: Topology) -> Iterator[Ears]:
    """All ears of a run, for as long as its supervisor lives: an attempt listens where the one
    before did, and nobody can have taken the port in between. Raises UserError if this host has no
    such address or a port is taken."""
    with contextlib.ExitStack() as held:
        controller = ranks = None
        if transport_kind(topology) == TCP:
            controller = over_tcp(topology, "transport.port", topology.transport.port)
            held.enter_context(controller.socket)
        if len(set(topology.actors.trainer.rank_hosts)) > 1:
            ranks = of_ranks(topology)
            held.enter_context(ranks.socket)
        yield Ears(controller, ranks)


def over_tcp(topology: Topology, setting: str, port: int | None) -> Ear:
    """An ear at a port of this host, `port` or any free one. One that listens on every interface is
    reached by the host's own address, or by loopback where it has none."""
    named, reached = bind_address(topology), reached_at(topology)
    if named is None or reached is None:
        raise nameless(topology)
    host = numeric(named, setting)
    check_reached(topology, reached, host if reached == named else reached)
    ear = listener(host, port, setting)
    found = ear.getsockname()[1]
    return Ear(ear, tcp_address(host, found), tcp_address(reached, found))


def of_ranks(topology: Topology) -> Ear:
    """Where the ranks of the trainer meet: at the address of the first host alone."""
    address = topology.cluster.hosts[host_name(topology, LOCALHOST)].address
    if address is None:
        raise nameless(topology)
    host = numeric(address, RANKS_PORT)
    ear = listener(host, topology.actors.trainer.port, RANKS_PORT)
    found = tcp_address(host, ear.getsockname()[1])
    return Ear(ear, found, found)


def listener(host: str, port: int | None, setting: str) -> socket.socket:
    """A socket that listens at an IP address of this host, at `port` or, for None, at any that is
    free. Raises UserError if that cannot be had.

    As many connections as the system allows wait there: all processes of a run come before its
    controller has loaded. A port that is given is tried for some seconds: the processes of a run
    that was killed a moment ago have it until they have heard of its end."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # `::` is all addresses, those of IPv4 too, as it is to ZeroMQ.
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    patience = Patience(LET_GO_SECONDS)
    while True:
        try:
            ear = socket.create_server(
                (host, port or 0), family=family, dualstack_ipv6=both, backlog=socket.SOMAXCONN
            )
        except OSError as error:
            if not port or error.errno != errno.EADDRINUSE or patience.over:
                raise no_ear(error, host, port, setting) from None
            time.sleep(TRY_SECONDS)
        else:
            ear.setblocking(False)  # who comes may have gone before it is let in
            return ear


def no_ear(error: OSError, host: str, port: int | None, setting: str) -> UserError:
    """The sentence for a port that cannot be listened on."""
    if error.errno == errno.EADDRINUSE and not port:
        return UserError(
            f"{setting} is null, and this host has no free port at {host}: all that the system "
            "gives out (net.ipv4.ip_local_port_range) are taken; expected one beyond these, or "
            "some of them to be free again"
        )
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"{setting} is {port}, on which something listens at {host} already; expected "
            "a free one, or null"
        )
    if error.errno == errno.EACCES:
        return UserError(
            f"{setting} is {port}, which this user may not listen on; expected one from "
            "1024 on, or null"
        )
    return no_address(host, os.strerror(error.errno or 0), setting)


def numeric(host: str, setting: str) -> str:
    """The IP address of a name, because sockets bind no names. Raises UserError if it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise no_address(host, error.strerror or str(error), setting) from None


def no_address(host: str, reason: str, setting: str) -> UserError:
    """The sentence for an address that is not one of this host's; `setting` is that of the port."""
    if setting == RANKS_PORT:
        return UserError(
            f"the ranks of the trainer cannot meet at {host!r}, which is no address of this host "
            f"({reason}); expected its own as the address of the first of cluster.hosts"
        )
    return UserError(
        f"the controller cannot listen at {host!r}, which is no address of this host "
        f"({reason}); expected one in transport.bind, or as the address of the first "
        "of cluster.hosts"
    )


def nameless(topology: Topology) -> UserError:
    """The sentence for a first host of which nobody has said where it is reached."""
    return UserError(
        f"cluster.hosts.{host_name(topology, LOCALHOST)}.address is missing; expected the address "
        "of this host under which the other hosts reach it"
    )
