"""Where the sockets of a run listen: chosen and tried before anything is started."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
from pathlib import Path

from zppo.config.cluster import LOCALHOST
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.placement import bind_address, check_reached, reached_at, transport_kind
from zppo.plan.processes import host_name
from zppo.records.run_directory import SOCKET_NAME
from zppo_protocol.addresses import TCP, tcp_address

MOST_FILES = 1 << 16


def raise_file_limit() -> None:
    """As many open files as this user may have, up to `MOST_FILES`, for this process and those that
    it starts. Each connection is one, a stranger's too for as long as it may take to show its key,
    and whoever can open no file any more fails at whatever is next."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listening(topology: Topology, folder: Path) -> tuple[str, str]:
    """The address that the controller binds, and the one at which its actors reach it.

    Raises UserError if the host has no such address or the port is taken.
    """
    if transport_kind(topology) != TCP:
        unix = f"ipc://{folder / SOCKET_NAME}"
        return unix, unix
    return over_tcp(topology, "transport.port", topology.transport.port)


def over_tcp(topology: Topology, setting: str, port: int | None) -> tuple[str, str]:
    """The addresses of a port of this host, `port` or any free one. One that listens on every
    interface is reached by the host's own address, or by loopback where it has none."""
    named, reached = bind_address(topology), reached_at(topology)
    if named is None or reached is None:
        first = host_name(topology, LOCALHOST)
        raise UserError(
            f"cluster.hosts.{first}.address is missing; expected the address of this host under "
            "which the other hosts reach it"
        )
    host = numeric(named)
    check_reached(topology, reached, host if reached == named else reached)
    port = port_of(host, port, setting)
    return tcp_address(host, port), tcp_address(reached, port)


def numeric(host: str) -> str:
    """The IP address of a name, because sockets bind no names. Raises UserError if it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise no_address(host, error) from None


def port_of(host: str, port: int | None = None, setting: str = "transport.port") -> int:
    """`port` if nobody listens on it at this address, or any such port for None. Raises UserError
    if it is taken, or if the address is not one of this host's."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
            found: int = probe.getsockname()[1]
            return found
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{setting} is {port}, on which something listens at {host} already; expected "
                "a free one, or null"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(
                f"{setting} is {port}, which this user may not listen on; expected one from "
                "1024 on, or null"
            ) from None
        raise no_address(host, error) from None


def no_address(host: str, error: OSError) -> UserError:
    """The sentence for an address that is not one of this host's."""
    return UserError(
        f"the controller cannot listen at {host!r}, which is no address of this host "
        f"({error.strerror}); expected one in transport.bind, or as the address of the first "
        "of cluster.hosts"
    )
