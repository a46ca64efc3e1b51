"""Where the controller of an attempt listens: chosen and tried before anything is started."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from zppo.config.cluster import LOCALHOST
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.placement import LOOPBACK, WILDCARDS, bind_address, transport_kind
from zppo.plan.processes import host_name
from zppo.records.run_directory import SOCKET_NAME
from zppo_protocol.addresses import TCP, tcp_address


def listening(topology: Topology, folder: Path) -> tuple[str, str]:
    """The address that the controller binds, and the one at which its actors reach it.

    Raises UserError if the host has no such address or the port is taken. One that listens on every
    interface is reached by the host's own address, or by loopback where it has none.
    """
    if transport_kind(topology) != TCP:
        unix = f"ipc://{folder / SOCKET_NAME}"
        return unix, unix
    host = bind_address(topology)
    port = port_of(host, topology.transport.port)
    facts = topology.cluster.hosts.get(host_name(topology, LOCALHOST))
    reached = host
    if host in WILDCARDS:
        reached = (facts.address if facts else None) or LOOPBACK
    return tcp_address(host, port), tcp_address(reached, port)


def port_of(host: str, port: int | None = None) -> int:
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
                f"transport.port is {port}, on which something listens at {host} already; expected "
                "a free one, or null"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(
                f"transport.port is {port}, which this user may not listen on; expected one from "
                "1024 on, or null"
            ) from None
        raise UserError(
            f"the controller cannot listen at {host!r}, which is no address of this host "
            f"({error.strerror}); expected one in transport.bind, or as the address of the first "
            "of cluster.hosts"
        ) from None
