"""Addresses of the controller's socket: `ipc:///path` on one host, `tcp://host:port` over many."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from zppo_protocol.errors import AccessError
from zppo_protocol.limits import MAX_IPC_PATH_BYTES

IPC, TCP = "ipc", "tcp"
WILDCARDS = ("*", "0.0.0.0", "[::]", "::")
"""Hosts that mean every interface of this machine."""


def scheme_of(address: str) -> str:
    """`ipc` or `tcp`, for an address that can be used. Raises ValueError saying what is wrong with
    any other."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme == IPC:
        ipc_path(address)
    elif separator and scheme == TCP:
        tcp_endpoint(address)
    else:
        raise ValueError(f"address {address!r} must start with ipc:// or tcp://")
    return scheme


def ipc_path(address: str) -> Path:
    """The path of the socket in an `ipc://` address. Raises ValueError for one without."""
    path = address.removeprefix("ipc://")
    if path == address or not path.startswith("/"):
        raise ValueError(f"address {address!r} must name an absolute path after ipc://")
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise ValueError(
            f"address {address!r} is longer than the {MAX_IPC_PATH_BYTES} bytes of a Unix socket's "
            "path"
        )
    return Path(path)


def tcp_endpoint(address: str) -> tuple[str, int]:
    """Host and port in a `tcp://` address; an IPv6 host stands in brackets. Raises ValueError for
    one without."""
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    bare = host.startswith("[") == host.endswith("]") and (host.startswith("[") or ":" not in host)
    if not (separator and host and bare and host.isascii() and not set(host) & set(" /;@")):
        raise ValueError(f"address {address!r} must be tcp://HOST:PORT, an IPv6 host in brackets")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"address {address!r} must end with a port from 1 to 65535")
    return host, int(port)


def tcp_address(host: str, port: int) -> str:
    """The address of this port of a host; brackets are put around an IPv6 one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_wildcard(address: str) -> bool:
    """Whether who binds this address is heard on every interface of the machine."""
    return address.startswith("tcp://") and tcp_endpoint(address)[0] in WILDCARDS


def check_private(folder: Path) -> None:
    """Raise AccessError unless the folder is this user's own and nobody else may enter it."""
    if not folder.is_dir():
        raise AccessError(f"the socket's folder {str(folder)!r} does not exist")
    found = folder.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 or found.st_uid != os.getuid():
        raise AccessError(
            f"the socket's folder {str(folder)!r} must be mine alone (mode 0700), its mode is "
            f"{mode:04o}"
        )
