"""Router and dealers: messages over ZeroMQ. The only file that imports zmq.

One router (the controller) is bound, every other process is a dealer whose identity is its actor
name; there is no other socket. Invariants: nothing a peer sends makes a socket raise (it is logged,
counted in `rejected` and dropped), nothing a peer fails to read makes the router wait, and no wait
is unbounded. Delivery is not promised: a message counts as delivered when its answer arrives, which
is why tasks are leased.

This version speaks `ipc://` only: a Unix socket in a folder that no other user may enter. A newer
connection takes over the identity of an older one (handover), so a restarted actor is heard at
once.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from zppo_protocol.codec import DEFAULT_LIMITS, decode, encode
from zppo_protocol.errors import ProtocolError
from zppo_protocol.limits import MAX_FRAMES, MAX_IDENTITY_BYTES, MAX_IPC_PATH_BYTES, Limits
from zppo_protocol.messages import AnyMessage

LOGGER = logging.getLogger(__name__)
IDENTITY = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_IDENTITY_BYTES - 1}}}")
COPIED = 2**19
"""Bytes of a frame below which a copy costs less than to be told when the frame has gone."""
RECONNECT_MILLISECONDS = (20, 1000)
"""First and longest pause between two attempts to reach the controller."""


class Router:
    """The controller's end: receives from all actors, sends to each by name. One thread only."""

    def __init__(self, address: str, limits: Limits = DEFAULT_LIMITS) -> None:
        """Bind `address`, an `ipc://` path in an existing private folder. Raises ValueError for any
        other address."""
        path = ipc_path(address)
        _check_private(path.parent)
        self.limits = limits
        self.rejected = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._close = _close_when_dropped(self, self._socket, self._context)
        _set_bounds(self._socket, limits)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(address)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)

    def receive(self, timeout_s: float) -> tuple[str, AnyMessage] | None:
        """Return the next (peer, message), or None after `timeout_s` seconds. Malformed messages
        are skipped."""
        for _ in _arrivals(self._socket, timeout_s):
            peer_frame, *frames = _read_frames(self._socket, 1 + MAX_FRAMES)
            try:
                peer = _peer_name(bytes(peer_frame))
                return peer, decode(frames, self.limits)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, repr(bytes(peer_frame)), error)
        return None

    def send(self, peer: str, message: AnyMessage) -> bool:
        """Queue `message` for `peer`; False if it is not connected or its queue is full. Never
        waits.

        Raises ProtocolError if `message` is not one the peer would accept.
        """
        frames = encode(message, self.limits)
        try:
            self._socket.send_multipart([peer.encode(), *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close(self) -> None:
        """Give unsent messages `linger_seconds`, then free the socket. Safe to call twice."""
        self._close()


class Dealer:
    """An actor's end of the line to the controller. One thread only. The controller may start
    later."""

    def __init__(self, address: str, identity: str, limits: Limits = DEFAULT_LIMITS) -> None:
        """Connect to `address` as `identity`. Raises ValueError for an address or a name that
        cannot be used."""
        self.limits = limits
        self.rejected = 0
        self._context = zmq.Context()
        self._socket = _connected(self._context, address, identity, limits)
        self._close = _close_when_dropped(self, self._socket, self._context)

    def receive(self, timeout_s: float) -> AnyMessage | None:
        """Return the next message, or None after `timeout_s` seconds. Malformed messages are
        skipped."""
        for _ in _arrivals(self._socket, timeout_s):
            try:
                return decode(_read_frames(self._socket, MAX_FRAMES), self.limits)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, "the controller", error)
        return None

    def send(self, message: AnyMessage) -> None:
        """Queue `message`. Raises TimeoutError if the queue stays full for `send_seconds`,
        ProtocolError if unfit."""
        try:
            self._socket.send_multipart(encode(message, self.limits), copy=False)
        except zmq.Again as error:
            raise _stalled(self.limits) from error

    def close(self) -> None:
        """Give unsent messages `linger_seconds`, then free the socket. Safe to call twice."""
        self._close()


class AsyncDealer:
    """`Dealer` for one asyncio loop. Keep one task in `receive` rather than cancelling it for a
    timeout."""

    def __init__(self, address: str, identity: str, limits: Limits = DEFAULT_LIMITS) -> None:
        """As for `Dealer`; call it inside the running loop."""
        self.limits = limits
        self.rejected = 0
        self._context = zmq.asyncio.Context()
        self._socket = _connected(self._context, address, identity, limits)
        self._close = _close_when_dropped(self, self._socket, self._context)

    async def receive(self) -> AnyMessage:
        """Return the next message. Malformed messages are skipped."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                return decode([frame.buffer for frame in frames], self.limits)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, "the controller", error)

    async def send(self, message: AnyMessage) -> None:
        """Queue `message`; see `Dealer.send`."""
        try:
            await self._socket.send_multipart(encode(message, self.limits), copy=False)
        except zmq.Again as error:
            raise _stalled(self.limits) from error

    def close(self) -> None:
        """Give unsent messages `linger_seconds`, then free the socket. Safe to call twice."""
        self._close()


def _close_when_dropped(owner: object, socket: Any, context: Any) -> Callable[[], object]:
    """Close when called or when `owner` is collected, whichever comes first, and only once.

    Left to itself, the collector may end the context while the socket is open, and that waits for
    ever.
    """
    closing = weakref.finalize(owner, _close, socket, context)
    closing.atexit = False
    return closing


def _close(socket: Any, context: Any) -> None:
    socket.close()
    context.term()


def ipc_path(address: str) -> Path:
    """Return the socket's path in an `ipc://` address. Raises ValueError saying what is wrong with
    any other."""
    scheme, separator, path = address.partition("://")
    if scheme != "ipc" or not separator:
        raise ValueError(
            f"address {address!r} must start with ipc:// (other transports come with multi-host "
            "runs)"
        )
    if not path.startswith("/"):
        raise ValueError(f"address {address!r} must name an absolute path after ipc://")
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise ValueError(
            f"address {address!r} is longer than the {MAX_IPC_PATH_BYTES} bytes of a Unix socket's "
            "path"
        )
    return Path(path)


def _check_private(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the socket's folder {str(folder)!r} does not exist")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077 or folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"the socket's folder {str(folder)!r} must be mine alone (mode 0700), its mode is "
            f"{mode:04o}"
        )


def _connected(context: Any, address: str, identity: str, limits: Limits) -> Any:
    ipc_path(address)
    if not IDENTITY.fullmatch(identity):
        raise ValueError(
            f"identity {identity!r} must be 1 to {MAX_IDENTITY_BYTES} letters, digits, '.', '_' or "
            "'-'"
        )
    socket = context.socket(zmq.DEALER)
    _set_bounds(socket, limits)
    socket.set(zmq.IDENTITY, identity.encode())
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS[0])
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MILLISECONDS[1])
    socket.connect(address)
    return socket


def _set_bounds(socket: Any, limits: Limits) -> None:
    socket.set(zmq.SNDHWM, limits.queue)
    socket.set(zmq.RCVHWM, limits.queue)
    socket.set(zmq.MAXMSGSIZE, limits.frame_bytes)
    socket.set(zmq.LINGER, round(1000 * limits.linger_seconds))
    socket.set(zmq.SNDTIMEO, round(1000 * limits.send_seconds))
    socket.copy_threshold = COPIED


def _arrivals(socket: zmq.Socket[bytes], timeout_s: float) -> Iterator[None]:
    """Yield whenever a message is there, until time is up, so that a flood of rubbish cannot keep
    the reader."""
    deadline = time.monotonic() + timeout_s
    while socket.poll(max(0, round(1000 * (deadline - time.monotonic())))):
        yield
        if time.monotonic() >= deadline:
            return


def _read_frames(socket: zmq.Socket[bytes], most: int) -> list[memoryview]:
    """Read one message that is there already; of one with too many frames keep `most + 1`, enough
    to refuse it."""
    frames = [socket.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        frames[most:] = [frame]
    return [frame.buffer for frame in frames]


def _peer_name(identity: bytes) -> str:
    name = identity.decode("ascii", errors="replace")
    if not IDENTITY.fullmatch(name):
        raise ProtocolError("the peer has no actor name")
    return name


def _log_rejection(count: int, peer: str, error: ProtocolError) -> None:
    # A hostile or broken peer may send thousands a second: only the 1st, 2nd, 4th, 8th … is written
    # down.
    if count & (count - 1) == 0:
        LOGGER.warning("rejected message %d, from %s: %s", count, peer, error)


def _stalled(limits: Limits) -> TimeoutError:
    return TimeoutError(f"the controller has read nothing for {limits.send_seconds:g} seconds")
