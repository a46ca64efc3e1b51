"""Every bound of the wire in one place: bytes, queue lengths and waiting times.

Invariant: no buffer and no wait in `codec` or `sockets` is unbounded. A header is decoded into
Python objects, which take up to about 64 times its size in the worst (hostile) case, so its bound
is far tighter than the payload's.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MIB = 2**20
MAX_FRAMES = 64
MAX_DIMENSIONS = 2
MAX_KEY_FILE_BYTES = 4 * MIB
JOINT_BYTES = 16
"""What holds header and payload together where both are in one frame."""
MAX_IPC_PATH_BYTES = 107
"""`sun_path` of a Unix socket holds 108 bytes with its final zero."""
PIECE_BYTES = 2**16
"""Largest piece of a frame on `tcp`. A stranger can make ZeroMQ hold one such piece for each of its
connections before its key is asked for."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of one socket.

    `header_bytes` and `payload_bytes` bound the two parts of a message. `queue` is the high-water
    mark, in messages, of each direction of each peer: with credits it is never reached by a peer
    that reads. `send_seconds` bounds how long a dealer waits for a controller that does not read,
    `linger_seconds` how long closing waits for unsent ones. On `tcp`, a connection over which
    nothing has come for `silence_seconds`, not even ZeroMQ's own heartbeat, is given up and made
    anew; one that is cut for less goes on where it stopped. `handshake_seconds` bounds how long a
    router holds a connection that has not shown a key, and how long a dealer tries where every
    handshake is broken off.
    """

    header_bytes: Annotated[int, Meta(ge=1)] = 64 * MIB
    payload_bytes: Annotated[int, Meta(ge=1)] = 1024 * MIB
    queue: Annotated[int, Meta(ge=1)] = 1000
    send_seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 30.0
    linger_seconds: Annotated[float, Meta(ge=0.0, le=60.0)] = 1.0
    silence_seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 60.0
    handshake_seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 10.0

    @property
    def message_bytes(self) -> int:
        """Both parts, which may be in one frame: one above it is refused before it is allocated."""
        return self.header_bytes + JOINT_BYTES + self.payload_bytes


def limits_for(max_message_mib: int) -> Limits:
    """Limits of a run whose topology allows messages of `max_message_mib` MiB
    (`transport.max_message_mib`)."""
    payload_bytes = max_message_mib * MIB
    return Limits(payload_bytes=payload_bytes, header_bytes=min(payload_bytes, 64 * MIB))
