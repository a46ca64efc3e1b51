"""Router and dealers: messages over ZeroMQ.

One router (the controller) is bound, every other process is a dealer; there is no other socket.
Invariants: nothing a peer sends makes a socket raise (it is logged, counted in `rejected` and
dropped), nothing a peer fails to read makes the router wait, and no wait is unbounded. Delivery is
not promised: a message counts as delivered when its answer arrives, which is why tasks are leased.

Who a message is from is not said by the message: it is the name that belongs to the key with which
its connection was let in (`doors`). Of several connections with one key the newest that has spoken
counts, so a restarted actor is heard at once, and one that only connects mutes nobody.

`ipc://` is a Unix socket in a folder that no other user may enter; `tcp://` is encrypted by CURVE.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq
import zmq.asyncio

from zppo_protocol.addresses import TCP, check_private, ipc_path, scheme_of
from zppo_protocol.codec import DEFAULT_LIMITS, Buffer, decode, encode
from zppo_protocol.doors import UNANSWERED, Doorkeeper, Doorstep, guard, monitor, show
from zppo_protocol.errors import AccessError, ProtocolError
from zppo_protocol.keys import Access, Credentials
from zppo_protocol.limits import MAX_FRAMES, PIECE_BYTES, Limits
from zppo_protocol.messages import AnyMessage
from zppo_protocol.pieces import cut, join, most_pieces

LOGGER = logging.getLogger(__name__)
COPIED = 2**19
"""Bytes of a frame below which a copy costs less than to be told when the frame has gone."""
RECONNECT_MILLISECONDS = (20, 1000)
"""First and longest pause between two attempts to reach the controller."""
OVERHEAD = 1024
"""Bytes that CURVE may add to a piece; it adds 33."""
ROUTE_BYTES = 5
"""A zero and a number that rises with each connection: how ZeroMQ names one that gave no name."""
HEARTBEATS = 6
"""ZeroMQ's own heartbeats in the silence after which a connection is given up."""
LOOK_SECONDS = 0.2
"""A dealer that sends, or has not been let in yet, looks so often at whether it was refused."""
NOW, MORE_NOW, READABLE, WRITABLE = map(
    int, (zmq.NOBLOCK, zmq.NOBLOCK | zmq.SNDMORE, zmq.POLLIN, zmq.POLLOUT)
)
"""As numbers: an operator of pyzmq's enumerations costs as much as a small message."""


class Router:
    """The controller's end: receives from all actors, sends to each by name. One thread only."""

    def __init__(
        self, access: Access, limits: Limits = DEFAULT_LIMITS, ear: int | None = None
    ) -> None:
        """Listen at `access.address` and let in whoever has a key of `access`. `ear` is the
        descriptor of a socket that listens there already, and is the router's from now on. Raises
        AccessError, one sentence, for an `ipc` address outside a private folder or one that cannot
        be bound."""
        self.limits = limits
        self.rejected = 0
        self.roles = access.roles
        """Role by name, of all that may be let in."""
        self.renewed: set[str] = set()
        """Peers that have spoken over a new connection after an old one; what was on its way over
        that is lost. Whoever has dealt with it takes the name out."""
        self._routes: dict[str, bytes] = {}
        ipc = scheme_of(access.address) != TCP
        if ipc:
            check_private(ipc_path(access.address).parent)
        self._frames = _Frames(access.address, limits)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _set_bounds(self._socket, access.address, limits)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        guard(self._socket, access, limits)
        if ear is not None:
            self._socket.set(zmq.USE_FD, ear)
        self._keeper = Doorkeeper(self._context, self._socket, access)
        self._line = _Line(self._socket)
        self._close = _close_when_dropped(self, self._socket, self._context, self._keeper.thread)
        try:
            self._socket.bind(access.address)
        except zmq.ZMQError as error:
            self.close()
            raise AccessError(f"cannot listen at {access.address}: {error.strerror}") from None
        if ipc:
            os.chmod(ipc_path(access.address), stat.S_IRUSR | stat.S_IWUSR)

    @property
    def refused(self) -> int:
        """How many connections were not let in."""
        return self._keeper.refused

    @property
    def refusal(self) -> str:
        """Why the last of them was not."""
        return self._keeper.reason

    def receive(self, timeout_s: float) -> tuple[str, AnyMessage] | None:
        """Return the next (peer, message), or None after `timeout_s` seconds. Malformed messages
        are skipped. The peer is the name of the key that it came with."""
        for route, *frames in self._line.arrivals(1 + self._frames.most, timeout_s):
            peer = str(route.get("User-Id"))
            try:
                self._follow(peer, route.bytes)
                return peer, self._frames.read(frames)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, peer, error)
        return None

    def send(self, peer: str, message: AnyMessage) -> bool:
        """Queue `message` for `peer`; False if it is not connected, has said nothing yet, or its
        queue is full. Never waits.

        Raises ProtocolError if `message` is not one the peer would accept.
        """
        frames = self._frames.write(message)
        route = self._routes.get(peer)
        if route is None:
            return False
        try:
            self._line.write([route, *frames])
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

    def _follow(self, peer: str, route: bytes) -> None:
        """Answer `peer` on the newest connection on which it has spoken."""
        known = self._routes.get(peer)
        if route == known:
            return
        if len(route) != ROUTE_BYTES or route[0]:
            raise ProtocolError("the peer has chosen a name for its connection")
        if known is not None and not _is_newer(route, known):
            raise ProtocolError("it came over an older connection of this actor")
        if known is not None:
            self.renewed.add(peer)
        self._routes[peer] = route


class Dealer:
    """An actor's end of the line to the controller. One thread only. The controller may start
    later."""

    def __init__(self, credentials: Credentials, limits: Limits = DEFAULT_LIMITS) -> None:
        """Connect to `credentials.address`. Raises ValueError for an address that cannot be
        used."""
        self.limits = limits
        self.rejected = 0
        self._frames = _Frames(credentials.address, limits)
        self._doorstep = Doorstep(credentials, limits)
        self._context = zmq.Context()
        self._socket, self._ear = _connected(self._context, credentials, limits)
        self._line = _Line(self._socket)
        self._refusal: AccessError | None = None
        self._next_look = 0.0
        self._close = _close_when_dropped(self, self._socket, self._context, None, self._ear)

    @property
    def admitted(self) -> bool:
        """Whether the controller has let this dealer in."""
        self._listen_at_the_door()
        return self._doorstep.admitted

    def receive(self, timeout_s: float) -> AnyMessage | None:
        """Return the next message, or None after `timeout_s` seconds. Malformed messages are
        skipped. Raises AccessError, one sentence, if the controller will not let this dealer in."""
        most, look = self._frames.most, self._listen_at_the_door
        for frames in self._line.arrivals(most, timeout_s, look):
            try:
                return self._frames.read(frames)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, "the controller", error)
        return None

    def send(self, message: AnyMessage) -> None:
        """Queue `message`. Raises TimeoutError if the queue stays full for `send_seconds`,
        ProtocolError if unfit, AccessError as `receive` does."""
        frames = self._frames.write(message)
        if time.monotonic() >= self._next_look:
            self._listen_at_the_door()
        while True:
            try:
                self._line.write(frames)
                return
            except zmq.Again as error:
                if not self._line.is_writable(self.limits.send_seconds, self._listen_at_the_door):
                    raise _stalled(self.limits) from error

    def close(self) -> None:
        """Give unsent messages `linger_seconds`, then free the socket. Safe to call twice."""
        self._close()

    def _listen_at_the_door(self) -> float:
        """How long to wait before the door is to be listened at again, in seconds. Raises
        AccessError once this dealer has been refused, and ever after: ZeroMQ has no queue any more
        for what it would send."""
        if self._refusal is not None:
            raise self._refusal
        try:
            while self._ear.get(zmq.EVENTS) & READABLE:
                self._doorstep.hear(self._ear.recv_multipart())
        except AccessError as refusal:
            self._refusal, self._next_look = refusal, 0.0
            raise
        self._next_look = time.monotonic() + LOOK_SECONDS
        return float("inf") if self._doorstep.admitted else LOOK_SECONDS


class AsyncDealer:
    """`Dealer` for one asyncio loop. Keep one task in `receive` rather than cancelling it for a
    timeout."""

    def __init__(self, credentials: Credentials, limits: Limits = DEFAULT_LIMITS) -> None:
        """As for `Dealer`; call it inside the running loop."""
        self.limits = limits
        self.rejected = 0
        self._frames = _Frames(credentials.address, limits)
        self._doorstep = Doorstep(credentials, limits)
        self._context = zmq.asyncio.Context()
        self._socket, self._ear = _connected(self._context, credentials, limits)
        self._next: asyncio.Future[Any] | None = None
        self._refusal: AccessError | None = None
        self._close = _close_when_dropped(self, self._socket, self._context, None, self._ear)
        self._listener = asyncio.create_task(_listen(weakref.ref(self), self._ear))

    async def receive(self) -> AnyMessage:
        """Return the next message. Malformed messages are skipped. Raises AccessError as
        `Dealer.receive` does."""
        while True:
            if self._refusal is not None:
                raise self._refusal
            self._next = self._socket.recv_multipart(copy=False)
            frames = await self._next
            try:
                return self._frames.read(frames)
            except ProtocolError as error:
                self.rejected += 1
                _log_rejection(self.rejected, "the controller", error)

    async def send(self, message: AnyMessage) -> None:
        """Queue `message`; see `Dealer.send`."""
        if self._refusal is not None:
            raise self._refusal
        try:
            await self._socket.send_multipart(self._frames.write(message), copy=False)
        except zmq.Again as error:
            raise self._refusal or _stalled(self.limits) from error

    def close(self) -> None:
        """Give unsent messages `linger_seconds`, then free the socket. Safe to call twice."""
        self._listener.cancel()
        self._close()

    def hear_at_the_door(self, message: list[bytes]) -> None:
        """Take what the monitor says; a refusal ends the wait for a message."""
        try:
            self._doorstep.hear(message)
        except AccessError as refusal:
            self._refusal = refusal
            if self._next is not None and not self._next.done():
                self._next.set_exception(refusal)


async def _listen(dealer: weakref.ref[AsyncDealer], ear: Any) -> None:
    """Consumes: what the monitor of a dealer says. Waits for: its next word. Is unblocked by: the
    end of the dealer, which this must not keep."""
    while True:
        message = await ear.recv_multipart()
        listening = dealer()
        if listening is None:
            return
        listening.hear_at_the_door(message)
        del listening


class _Frames:
    """Messages as the frames of one transport: whole on `ipc`, in pieces on `tcp`."""

    def __init__(self, address: str, limits: Limits) -> None:
        self._limits = limits
        self._in_pieces = scheme_of(address) == TCP
        self.most = most_pieces(limits) if self._in_pieces else MAX_FRAMES
        """The most that a message may have."""

    def write(self, message: AnyMessage) -> Sequence[Buffer]:
        """The frames of a message. Raises ProtocolError if it is not fit to be sent."""
        frames = encode(message, self._limits)
        return cut(frames) if self._in_pieces else frames

    def read(self, found: Sequence[Any]) -> AnyMessage:
        """The message in these frames. Raises ProtocolError for anything else."""
        frames = [memoryview(frame) for frame in found]
        if self._in_pieces:
            if not 1 < len(frames) <= self.most:
                raise ProtocolError(f"a message has 2 to {self.most} pieces, got {len(frames)}")
            frames = join(frames, self._limits)
        return decode(frames, self._limits)


class _Line:
    """A socket that is only waited for by Python's poll.

    ZeroMQ's own waits begin anew after each signal that a handler takes, and its poll as pyzmq
    calls it then counts whole seconds; Python's poll keeps to its time. And it is asked only where
    nothing is there: to ask a socket what has happened costs more than to read a message.
    """

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._poll = select.poll()
        self._poll.register(socket.FD, select.POLLIN)  # says only that something has happened

    def arrivals(
        self, most: int, timeout_s: float, look: Callable[[], float] | None = None
    ) -> Iterator[list[zmq.Frame]]:
        """Yield the frames of each message that comes until time is up, so that a flood of rubbish
        cannot keep the reader; of one with too many frames `most + 1`, enough to refuse it. `look`
        is called before each wait and says how long that may be, in seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            if frames := self._read(most):
                yield frames
            left = deadline - time.monotonic()
            if left <= 0.0:
                return
            if not frames:
                self._wait(left if look is None else min(left, look()))

    def write(self, frames: Sequence[Buffer]) -> None:
        """Queue one message. Raises zmq.Again where the queue is full."""
        *first, last = frames
        for frame in first:
            self._socket.send(frame, MORE_NOW, False)
        self._socket.send(last, NOW, False)

    def is_writable(self, wait_s: float, look: Callable[[], object]) -> bool:
        """Wait until a message can be queued; False when time is up. `look` is called meanwhile."""
        deadline = time.monotonic() + wait_s
        while not self._socket.get(zmq.EVENTS) & WRITABLE:
            look()
            left = deadline - time.monotonic()
            if left <= 0.0:
                return False
            self._wait(min(left, LOOK_SECONDS))
        return True

    def _read(self, most: int) -> list[zmq.Frame]:
        """The frames of a message that is there, or nothing."""
        receive = self._socket.recv
        try:
            frames = [receive(NOW, False)]
        except zmq.Again:
            return []
        while frames[-1].more:
            frames[most:] = [receive(NOW, False)]
        return frames

    def _wait(self, wait_s: float) -> None:
        """Wait until something has happened since the socket was last found empty or full."""
        self._poll.poll(1000.0 * wait_s)


def _close_when_dropped(
    owner: object,
    socket: Any,
    context: Any,
    keeper: threading.Thread | None,
    ear: Any = None,
) -> Callable[[], object]:
    """Close when called or when `owner` is collected, whichever comes first, and only once.

    Left to itself, the collector may end the context while the socket is open, and that waits for
    ever.
    """
    closing = weakref.finalize(owner, _close, socket, context, keeper, ear)
    closing.atexit = False
    return closing


def _close(socket: Any, context: Any, keeper: threading.Thread | None, ear: Any) -> None:
    if ear is not None:
        socket.disable_monitor()
        ear.close(0)
    socket.close()
    if keeper is threading.current_thread():
        # The collector may run anywhere; the context waits for the keeper's own sockets.
        threading.Thread(target=context.term, name="closing").start()
    else:
        context.term()


def _connected(context: Any, credentials: Credentials, limits: Limits) -> tuple[Any, Any]:
    """The dealer's socket and its monitor."""
    scheme_of(credentials.address)
    socket = context.socket(zmq.DEALER)
    _set_bounds(socket, credentials.address, limits)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS[0])
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MILLISECONDS[1])
    socket.set(zmq.HANDSHAKE_IVL, round(1000 * UNANSWERED * limits.handshake_seconds))
    show(socket, credentials)
    ear = monitor(context, socket, Doorstep.EVENTS)
    socket.connect(credentials.address)
    return socket, ear


def _set_bounds(socket: Any, address: str, limits: Limits) -> None:
    socket.set(zmq.SNDHWM, limits.queue)
    socket.set(zmq.RCVHWM, limits.queue)
    socket.set(zmq.LINGER, round(1000 * limits.linger_seconds))
    socket.set(zmq.SNDTIMEO, round(1000 * limits.send_seconds))
    socket.copy_threshold = COPIED
    if scheme_of(address) == TCP:
        silence = round(1000 * limits.silence_seconds)
        socket.set(zmq.MAXMSGSIZE, PIECE_BYTES + OVERHEAD)
        socket.set(zmq.IPV6, "[" in address)
        socket.set(zmq.HEARTBEAT_IVL, max(1, silence // HEARTBEATS))
        socket.set(zmq.HEARTBEAT_TIMEOUT, silence)
    else:
        socket.set(zmq.MAXMSGSIZE, limits.message_bytes)


def _is_newer(route: bytes, known: bytes) -> bool:
    """Whether a connection was made after another; ZeroMQ counts them, modulo 2^32."""
    steps = int.from_bytes(route[1:], "big") - int.from_bytes(known[1:], "big")
    return steps % 2**32 < 2**31


def _log_rejection(count: int, peer: str, error: ProtocolError) -> None:
    # A hostile or broken peer may send thousands a second: only the 1st, 2nd, 4th, 8th … is written
    # down.
    if count & (count - 1) == 0:
        LOGGER.warning("rejected message %d, from %s: %s", count, peer, error)


def _stalled(limits: Limits) -> TimeoutError:
    return TimeoutError(f"the controller has read nothing for {limits.send_seconds:g} seconds")
