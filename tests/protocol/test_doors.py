"""Who is let in and who is not: real sockets, strangers, and what is said of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from wires import Wire, connected, free_port

from zppo_protocol import messages as m
from zppo_protocol.codec import encode
from zppo_protocol.doors import HANDSHAKE_TRIES
from zppo_protocol.errors import AccessError
from zppo_protocol.keys import SecretKey
from zppo_protocol.limits import PIECE_BYTES, Limits
from zppo_protocol.pieces import cut
from zppo_protocol.sockets import AsyncDealer, Dealer, Router

PATIENCE = 300.0
BRIEF = Limits(handshake_seconds=0.2)


@pytest.fixture(params=["ipc", "tcp"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        yield Wire.of(request.param, Path(folder))


@pytest.fixture
def tcp() -> Wire:
    return Wire(f"tcp://127.0.0.1:{free_port()}")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def still_serves(router: Router, wire: Wire) -> None:
    """An actor of the run is let in, heard and answered."""
    dealer = Dealer(wire["trainer"])
    try:
        dealer.send(m.Credits(count=7))
        while (got := router.receive(PATIENCE)) != ("trainer", m.Credits(count=7)):
            assert got is not None
        assert router.send("trainer", m.ReleasePolicy(version=7))
        assert dealer.receive(PATIENCE) == m.ReleasePolicy(version=7)
    finally:
        dealer.close()


def messages_of(wire: Wire, message: m.AnyMessage) -> Any:
    frames = encode(message)
    return cut(frames) if wire.address.startswith("tcp") else frames


# ---- strangers -----------------------------------------------------------------------------------


def test_a_key_that_is_on_no_list(
    wire: Wire, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router = opened(Router(wire.access))
    stranger = opened(Dealer(replace(wire["rollout-0"], secret=SecretKey.new())))
    stranger.send(m.Credits(count=1))
    with pytest.raises(AccessError) as caught:
        stranger.receive(PATIENCE)
    assert str(caught.value) == (
        f"the controller at {wire.address} does not let rollout-0 in: its key is not one of this "
        "life of the run (ZAP status 400)"
    )
    with pytest.raises(AccessError, match="does not let rollout-0 in"):
        stranger.send(m.Credits(count=1))  # ZeroMQ has no queue for it, and would wait for one
    until(lambda: router.refused >= 1)
    assert router.refusal in (
        "its key is not that of 'rollout-0' in this life of the run",
        "its key is not on the list of this life of the run",
    )
    assert f": {router.refusal}" in caplog.text and "refused connection 1, of " in caplog.text
    assert router.receive(0.05) is None
    still_serves(router, wire)


def test_an_async_dealer_is_told_so_too(wire: Wire, opened: Any) -> None:
    opened(Router(wire.access))

    async def knock() -> None:
        dealer = AsyncDealer(replace(wire["rollout-0"], secret=SecretKey.new()))
        try:
            with pytest.raises(AccessError, match="does not let rollout-0 in"):
                await asyncio.wait_for(dealer.receive(), PATIENCE)
            await dealer.send(m.Credits(count=1))
        finally:
            dealer.close()

    with pytest.raises(AccessError, match="does not let rollout-0 in"):
        asyncio.run(knock())


def test_a_client_without_a_key(wire: Wire, opened: Any) -> None:
    router = opened(Router(wire.access))
    keyless = opened(connected(zmq.Context.instance().socket(zmq.DEALER), wire.address))
    keyless.send_multipart(messages_of(wire, m.Credits(count=1)))
    until(lambda: router.refused >= 1)
    assert router.refusal == "it shows no key"
    assert router.receive(0.05) is None
    still_serves(router, wire)


def test_a_password_for_a_curve(tcp: Wire, opened: Any) -> None:
    """The mechanism of ipc opens nothing on tcp, where it would show the secret to the network."""
    router = opened(Router(tcp.access))
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.PLAIN_USERNAME, b"rollout-0")
    socket.set(zmq.PLAIN_PASSWORD, tcp["rollout-0"].secret.reveal().encode())
    opened(connected(socket, tcp.address)).send_multipart(messages_of(tcp, m.Credits(count=1)))
    until(lambda: router.refused >= 1)
    assert router.receive(0.05) is None


def test_a_key_of_one_with_the_name_of_another(opened: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    wire = Wire.of("ipc", tmp_path)
    router = opened(Router(wire.access))
    thief = opened(Dealer(replace(wire["rollout-0"], secret=wire["rollout-1"].secret)))
    with pytest.raises(AccessError, match="does not let rollout-0 in"):
        thief.receive(PATIENCE)
    assert router.refusal == "its key is not that of 'rollout-0' in this life of the run"


def test_a_name_is_that_of_the_key(tcp: Wire, opened: Any) -> None:
    router = opened(Router(tcp.access))
    thief = opened(Dealer(replace(tcp["rollout-1"], name="rollout-0")))
    thief.send(m.Credits(count=1))
    assert router.receive(PATIENCE) == ("rollout-1", m.Credits(count=1))
    assert router.send("rollout-0", m.ReleasePolicy(version=1)) is False


def test_a_controller_with_another_key(tcp: Wire, opened: Any) -> None:
    router = opened(Router(tcp.access))
    astray = opened(Dealer(replace(tcp["rollout-0"], server=SecretKey.new().public), BRIEF))
    with pytest.raises(AccessError) as caught:
        astray.receive(PATIENCE)
    assert str(caught.value) == (
        f"the controller at {tcp.address} breaks off every handshake with rollout-0: its key file "
        "is of another run, or of another life of this one, and names another controller's key"
    )
    until(lambda: router.refused >= 8)
    assert router.refusal == "its key file names another controller's key"
    still_serves(router, tcp)


def test_who_only_sends_hears_of_a_refusal(wire: Wire, opened: Any) -> None:
    """An actor that was let in, and whose controller another life has followed at the address."""
    router, left_over = Router(wire.access), opened(Dealer(wire["rollout-0"], BRIEF))
    left_over.send(m.Credits(count=1))
    assert router.receive(PATIENCE) == ("rollout-0", m.Credits(count=1))
    router.close()
    opened(Router(Wire(wire.address).access))
    with pytest.raises(AccessError, match=r"let rollout-0 in|breaks off every handshake"):
        until(lambda: left_over.send(m.Credits(count=1)) is not None)
    with pytest.raises(AccessError):
        left_over.send(m.Credits(count=1))


def test_a_controller_that_has_its_port_and_has_not_begun_is_waited_for(
    tcp: Wire, opened: Any
) -> None:
    """However many handshakes nobody answers: more than may be broken off."""
    limits = Limits(handshake_seconds=0.03)
    with socket.create_server(("127.0.0.1", int(tcp.address.rpartition(":")[2]))) as ear:
        ear.setblocking(False)
        dealer = opened(Dealer(tcp["rollout-0"], limits))
        dealer.send(m.Credits(count=1))
        knocks: list[socket.socket] = []
        while len(knocks) < HANDSHAKE_TRIES + 2:
            assert dealer.receive(0.01) is None
            with contextlib.suppress(BlockingIOError):
                knocks.append(ear.accept()[0])
        for knock in knocks:
            knock.close()
        router = opened(Router(tcp.access, ear=os.dup(ear.fileno())))
        assert router.receive(PATIENCE) == ("rollout-0", m.Credits(count=1))


def test_what_listens_is_no_controller(tcp: Wire, opened: Any) -> None:
    with socket.create_server(("127.0.0.1", int(tcp.address.rpartition(":")[2]))) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(10)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 80)
                closed_by_the_other(peer)

        thread = threading.Thread(target=answer)
        thread.start()
        lost = opened(Dealer(tcp["rollout-0"]))
        with pytest.raises(AccessError) as caught:
            lost.receive(PATIENCE)
        thread.join()
    assert str(caught.value) == (
        f"what listens at {tcp.address} is no controller that rollout-0 can speak with: it does "
        "not use keys, or does not speak ZeroMQ"
    )


# ---- identities ----------------------------------------------------------------------------------


def test_an_idle_dealer_under_the_name_of_another_mutes_nobody(wire: Wire, opened: Any) -> None:
    router, real = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    real.send(m.Credits(count=1))
    assert router.receive(PATIENCE) == ("rollout-0", m.Credits(count=1))
    opened(wire.raw_dealer("rollout-1", b"rollout-0"))
    same_route = opened(wire.raw_dealer("rollout-1", router._routes["rollout-0"]))
    idle = opened(Dealer(wire["rollout-0"]))
    until(lambda: idle.admitted)
    same_route.send_multipart(messages_of(wire, m.Credits(count=9)))
    for version in range(20):
        assert router.send("rollout-0", m.ReleasePolicy(version=version))
        assert real.receive(PATIENCE) == m.ReleasePolicy(version=version)
    assert router.receive(0.05) is None and idle.receive(0.0) is None


def test_a_refused_dealer_mutes_nobody(wire: Wire, opened: Any) -> None:
    router, real = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    real.send(m.Credits(count=1))
    router.receive(PATIENCE)
    stranger = opened(Dealer(replace(wire["rollout-0"], secret=SecretKey.new())))
    with pytest.raises(AccessError):
        stranger.receive(PATIENCE)
    assert router.send("rollout-0", m.ReleasePolicy(version=1))
    assert real.receive(PATIENCE) == m.ReleasePolicy(version=1)


# ---- rubbish on the port -------------------------------------------------------------------------

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\x00") + bytes(32)
RUBBISH = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(200)),
    "ZMTP 1": b"\x05\x00abcd\x05\x00hello",
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00",
    "ZMTP 3 without security": GREETING.replace(b"CURVE", b"NULL\x00")
    + b"\x04\x05READY"
    + bytes(9),
    "a greeting and noise": GREETING + bytes(range(256)) * 40,
    "random": os.urandom(5000),
    "zeros": bytes(5000),
    "nothing": b"",
}


def raw(wire: Wire) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", int(wire.address.rpartition(":")[2])))
    peer.settimeout(PATIENCE)
    return peer


def closed_by_the_other(peer: socket.socket) -> None:
    """Read until the other side has hung up."""
    try:
        while peer.recv(4096):
            pass
    except ConnectionResetError:
        pass


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_harmless(tcp: Wire, opened: Any, name: str) -> None:
    router = opened(Router(tcp.access, BRIEF))
    with raw(tcp) as peer:
        peer.sendall(RUBBISH[name])
        closed_by_the_other(peer)
    assert router.receive(0.0) is None and router.rejected == 0
    still_serves(router, tcp)


@pytest.mark.parametrize("size", [PIECE_BYTES + 4096, 2**30, 2**62])
def test_a_stranger_cannot_reserve_more_than_one_piece(tcp: Wire, opened: Any, size: int) -> None:
    """It announces a long command before it has shown a key: the router hangs up at the number."""
    router = opened(Router(tcp.access, Limits(handshake_seconds=3600.0)))
    with raw(tcp) as peer:
        peer.sendall(GREETING + b"\x06" + size.to_bytes(8, "big"))
        closed_by_the_other(peer)
    still_serves(router, tcp)
