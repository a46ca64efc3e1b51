"""Who is let in: the controller's doorkeeper, and what an actor hears at the door.

The doorkeeper is one thread beside the router. It answers ZeroMQ's questions of who may come in
(ZAP, RFC 27) and reads what the router's monitor says of handshakes that failed. A name belongs to
a key: whoever shows the key of `rollout-0` is `rollout-0` in every message, whatever it says of
itself. On `tcp` a key is shown by CURVE's handshake; on `ipc`, where nobody can listen, the secret
itself is, by the PLAIN mechanism, which costs nothing per message.

Invariant: a peer whose key is not on the list is refused before a word of it is read, counted in
`refused`, and the reason is logged once in a while; a dealer that is refused raises `AccessError`
instead of knocking for ever. Secrets are never logged: pyzmq's own authenticator writes passwords
to the log, which is why it is not used.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from zppo_protocol.addresses import IPC, is_wildcard, scheme_of
from zppo_protocol.errors import AccessError
from zppo_protocol.keys import Access, Credentials, SecretKey
from zppo_protocol.limits import Limits

DOMAIN = b"zppo"
ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
MONITOR_ADDRESS = "inproc://door"
ADMITTED, DENIED = b"200", b"400"
HANDSHAKE_TRIES = 8
"""A dealer gives up after so many handshakes in a row that the other side broke off, if time is up
as well: one or two may have met a controller that was being ended."""
SILENT, UNANSWERED = 2, 3
"""In `handshake_seconds`: a router that has taken a connection has answered or ended it before; so
long a dealer waits for its answer."""
FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
CRYPTOGRAPHIC = 0x11000001
"""What the monitor says of a box that cannot be opened."""
MISMATCH = 0x11000002
"""And of a peer that knows another way to be let in, or none."""

log = logging.getLogger("zppo_protocol.sockets")


def guard(socket: zmq.Socket[bytes], access: Access, limits: Limits) -> None:
    """Let a router ask for keys, before it binds."""
    if scheme_of(access.address) == IPC:
        socket.set(zmq.PLAIN_SERVER, 1)
    else:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, access.secret.reveal().encode())
    # Without a domain ZeroMQ would let everybody in where nobody answers its questions.
    socket.set(zmq.ZAP_DOMAIN, DOMAIN)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.set(zmq.HANDSHAKE_IVL, round(1000 * limits.handshake_seconds))
    if is_wildcard(access.address):
        log.warning(
            "%s is open on every interface of this host, to holders of a key", access.address
        )


def show(socket: zmq.Socket[bytes], credentials: Credentials) -> None:
    """Let a dealer show its key, before it connects."""
    secret = credentials.secret
    if scheme_of(credentials.address) == IPC:
        socket.set(zmq.PLAIN_USERNAME, credentials.name.encode())
        socket.set(zmq.PLAIN_PASSWORD, secret.reveal().encode())
    else:
        socket.set(zmq.CURVE_SERVERKEY, credentials.server.encode())
        socket.set(zmq.CURVE_PUBLICKEY, secret.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, secret.reveal().encode())


def monitor(context: Any, socket: Any, events: int) -> Any:
    """A socket that reads these events of another. Its queue has no bound, so that ZeroMQ never
    waits for its reader."""
    socket.monitor(MONITOR_ADDRESS, events)
    ear = context.socket(zmq.PAIR)
    ear.set(zmq.RCVHWM, 0)
    ear.connect(MONITOR_ADDRESS)
    return ear


class Doorkeeper:
    """The thread beside a router. It ends with the router's context."""

    def __init__(
        self, context: zmq.Context[Any], socket: zmq.Socket[bytes], access: Access
    ) -> None:
        self.refused = 0
        self.reason = ""
        """Why the last one was refused."""
        self._access = access
        self._questions = context.socket(zmq.REP)
        self._questions.bind(ZAP_ADDRESS)
        self._failures = monitor(context, socket, FAILED)
        self.thread = threading.Thread(target=self._serve, daemon=True, name="doorkeeper")
        self.thread.start()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._questions, zmq.POLLIN)
        poller.register(self._failures, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    if socket is self._questions:
                        socket.send_multipart(self._answer(socket.recv_multipart()))
                    else:
                        self._note("somebody", _why(socket.recv_multipart()))
        except zmq.ContextTerminated:
            self._questions.close(0)
            self._failures.close(0)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, request, domain, peer, _, mechanism, *shown = question
        name, reason = "", "it was asked in words of another version"
        if (version, domain) == (ZAP_VERSION, DOMAIN):
            name, reason = self._named(mechanism, shown)
        if name:
            return [ZAP_VERSION, request, ADMITTED, b"OK", name.encode(), b""]
        self._note(peer.decode(errors="replace"), reason)
        return [ZAP_VERSION, request, DENIED, b"not admitted", b"", b""]

    def _named(self, mechanism: bytes, shown: list[bytes]) -> tuple[str, str]:
        """The name that a key stands for, or nothing and the reason."""
        names = self._access.names
        if mechanism == b"CURVE" and len(shown) == 1:
            public = z85.encode(shown[0]).decode()
            return names.get(public, ""), "its key is not on the list of this life of the run"
        if mechanism == b"PLAIN" and len(shown) == 2:
            claimed, secret = (text.decode(errors="replace") for text in shown)
            try:
                public = SecretKey(secret).public
            except AccessError:
                return "", f"it shows no key, as {claimed!r}"
            if names.get(public) == claimed:
                return claimed, ""
            return "", f"its key is not that of {claimed!r} in this life of the run"
        return "", "it shows no key"

    def _note(self, peer: str, reason: str) -> None:
        self.refused += 1
        self.reason = reason
        # A scanner may knock thousands of times: only the 1st, 2nd, 4th, 8th … is written down.
        if self.refused & (self.refused - 1) == 0:
            log.warning("refused connection %d, of %s: %s", self.refused, peer, reason)


def _why(message: list[bytes]) -> str:
    """Why a handshake failed, as far as the router's monitor says."""
    found = parse_monitor_message(message)
    # Which of the two comes depends on who hangs up first.
    if found["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or found["value"] == MISMATCH:
        return "it shows no key"
    if found["value"] == CRYPTOGRAPHIC:
        return "its key file names another controller's key"
    return "it does not speak as an actor does"


class Doorstep:
    """What a dealer's monitor says, and what it means: nothing yet, let in, or refused."""

    EVENTS = (
        zmq.EVENT_CONNECTED
        | zmq.EVENT_DISCONNECTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    )

    def __init__(self, credentials: Credentials, limits: Limits) -> None:
        self.admitted = False
        self._name, self._address = credentials.name, credentials.address
        self._patience = limits.handshake_seconds
        self._broken_off, self._since = 0, 0.0
        self._in_handshake, self._connected = False, 0.0

    def hear(self, message: list[bytes]) -> None:
        """Take one message of the monitor. Raises AccessError when this dealer will not be let
        in."""
        found = parse_monitor_message(message)
        event, value = found["event"], found["value"]
        if event == zmq.EVENT_CONNECTED:
            self._in_handshake, self._connected = True, time.monotonic()
            return
        left, self._in_handshake = self._in_handshake, False
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.admitted, self._broken_off = True, 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise AccessError(
                f"the controller at {self._address} does not let {self._name} in: its key is not "
                f"one of this life of the run (ZAP status {value})"
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or (
            event == zmq.EVENT_DISCONNECTED and left
        ):
            raise AccessError(
                f"what listens at {self._address} is no controller that {self._name} can speak "
                "with: it does not use keys, or does not speak ZeroMQ"
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            now = time.monotonic()
            if now - self._connected > SILENT * self._patience:
                # Nobody has broken it off: the controller has its port before it begins, and has
                # said nothing yet.
                self._broken_off = 0
                return
            self._since = self._since if self._broken_off else now
            self._broken_off += 1
            if self._broken_off >= HANDSHAKE_TRIES and now - self._since >= self._patience:
                raise AccessError(
                    f"the controller at {self._address} breaks off every handshake with "
                    f"{self._name}: its key file is of another run, or of another life of this "
                    "one, and names another controller's key"
                )
