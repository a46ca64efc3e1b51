"""Real sockets: who is heard, who is not, and that no peer can hold up or bring down the router."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wires import Wire, free_port

import zppo_protocol
from zppo_protocol import messages as m
from zppo_protocol.addresses import ipc_path, tcp_endpoint
from zppo_protocol.codec import encode
from zppo_protocol.errors import AccessError, ProtocolError
from zppo_protocol.keys import Credentials, issue, pack_credentials
from zppo_protocol.limits import MAX_FRAMES, MIB, Limits, limits_for
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.sockets import AsyncDealer, Dealer, Router

PATIENCE = 300.0
PEER = Path(__file__).with_name("socket_peer.py")


@pytest.fixture(params=["ipc", "tcp"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        yield Wire.of(request.param, Path(folder))


@pytest.fixture
def unix() -> Iterator[Wire]:
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        yield Wire.of("ipc", Path(folder))


class Peer:
    """A dealer process."""

    def __init__(self, credentials: Credentials, incarnation: int = 0, then: str = "echo") -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(zppo_protocol.__file__).parents[1])}
        command = [sys.executable, str(PEER), str(incarnation), then]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(pack_credentials(credentials))
        self.process.stdin.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def heard(router: Router) -> tuple[str, Any]:
    got = router.receive(PATIENCE)
    assert got is not None, "nothing arrived"
    return got


def result(tokens: int) -> m.GenerateResult:
    samples = GroupSamples(
        prompt_ids=np.array([1], np.int32),
        token_ids=np.arange(tokens, dtype=np.int32),
        log_probs=np.full(tokens, -1.0, np.float32),
        offsets=np.array([0, tokens], np.int32),
        version_spans=np.array([[tokens, 3]] if tokens else [], np.int32).reshape(-1, 2),
        texts=[""],
        finish_reasons=["stop"],
    )
    return m.GenerateResult(task_id="t", samples=samples)


# ---- plain talk ----------------------------------------------------------------------------------


def test_a_question_and_its_answer(wire: Wire, opened: Any) -> None:
    router, dealer = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    dealer.send(m.Credits(count=4))
    assert heard(router) == ("rollout-0", m.Credits(count=4))
    assert router.send("rollout-0", m.Welcome(heartbeat_seconds=1.0))
    assert dealer.receive(PATIENCE) == m.Welcome(heartbeat_seconds=1.0)


def test_receive_returns_none_when_time_is_up(wire: Wire, opened: Any) -> None:
    router, dealer = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    assert router.receive(0.0) is None and router.receive(0.01) is None
    assert dealer.receive(0.0) is None and dealer.receive(0.01) is None


class Between:
    """A port that passes bytes on to another, until its connections are reset."""

    def __init__(self, port: int) -> None:
        self._target, self._ends = port, []
        self._ear = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._ear.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._ear.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    def reset(self) -> None:
        while self._ends:
            with contextlib.suppress(OSError):
                self._ends.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ear.shutdown(socket.SHUT_RDWR)
        self._ear.close()
        self.reset()


def test_a_connection_that_comes_anew_is_noticed(opened: Any) -> None:
    wire = Wire(f"tcp://127.0.0.1:{free_port()}")
    router = opened(Router(wire.access))
    between = opened(Between(tcp_endpoint(wire.address)[1]))
    away = replace(wire["rollout-0"], address=f"tcp://127.0.0.1:{between.port}")
    dealer, other = opened(Dealer(away)), opened(Dealer(wire["rollout-1"]))
    for speaking in (dealer, other):
        speaking.send(m.Credits(count=1))
        assert heard(router)[1] == m.Credits(count=1)
    assert router.renewed == set()
    between.reset()
    deadline = time.monotonic() + PATIENCE
    while not router.renewed and time.monotonic() < deadline:
        for speaking in (dealer, other):
            speaking.send(m.Heartbeat(progress=0))
        router.receive(0.1)
    assert router.renewed == {"rollout-0"}
    assert router.send("rollout-0", m.Forgotten()) and dealer.receive(PATIENCE) == m.Forgotten()


def test_many_messages_keep_their_order(wire: Wire, opened: Any) -> None:
    router, dealer = opened(Router(wire.access)), opened(Dealer(wire["trainer"]))
    for i in range(300):
        dealer.send(m.Heartbeat(progress=i))
    assert [heard(router)[1].progress for _ in range(300)] == list(range(300))


def test_a_large_answer_outlives_its_socket(wire: Wire, opened: Any) -> None:
    router, dealer = Router(wire.access), opened(Dealer(wire["rollout-0"]))
    dealer.send(result(1_000_000))
    samples = heard(router)[1].samples
    router.close()
    assert (
        np.array_equal(samples.token_ids, np.arange(1_000_000))
        and not samples.token_ids.flags.writeable
    )


@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 100, 1000, 4000])
def test_small_answers_come_out_aligned(wire: Wire, opened: Any, tokens: int) -> None:
    router, dealer = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    dealer.send(result(tokens))
    samples = heard(router)[1].samples
    assert samples.token_ids.flags.aligned and samples.log_probs.flags.aligned
    assert np.array_equal(samples.token_ids, np.arange(tokens))


def test_async_dealer_speaks_the_same(wire: Wire, opened: Any) -> None:
    router = opened(Router(wire.access))

    async def talk() -> Any:
        dealer = AsyncDealer(wire["rollout-0"])
        try:
            await dealer.send(m.Credits(count=2))
            assert await asyncio.to_thread(heard, router) == ("rollout-0", m.Credits(count=2))
            assert router.send("rollout-0", m.Shutdown(reason="done"))
            return await asyncio.wait_for(dealer.receive(), PATIENCE)
        finally:
            dealer.close()

    assert asyncio.run(talk()) == m.Shutdown(reason="done")


# ---- coming and going ----------------------------------------------------------------------------


def test_dealers_may_start_before_the_router(wire: Wire, opened: Any) -> None:
    dealer = opened(Dealer(wire["rollout-0"]))
    dealer.send(m.Credits(count=4))
    assert dealer.receive(0.05) is None
    assert heard(opened(Router(wire.access))) == ("rollout-0", m.Credits(count=4))


def test_a_router_has_a_port_that_was_bound_before_it_began(opened: Any) -> None:
    """So has the next; whoever comes in between waits for it. Then the port is free."""
    ear = socket.create_server(("127.0.0.1", 0))
    wire = Wire(f"tcp://127.0.0.1:{ear.getsockname()[1]}")
    dealer = opened(Dealer(wire["rollout-0"]))
    dealer.send(m.Credits(count=1))
    assert dealer.receive(0.05) is None
    router = Router(wire.access, ear=os.dup(ear.fileno()))
    assert heard(router) == ("rollout-0", m.Credits(count=1))
    router.close()
    dealer.send(m.Credits(count=2))
    router = Router(wire.access, ear=ear.detach())
    assert heard(router) == ("rollout-0", m.Credits(count=2))
    router.close()
    opened(Router(wire.access))


def test_a_dealer_finds_a_router_that_was_started_anew(wire: Wire, opened: Any) -> None:
    router, dealer = Router(wire.access), opened(Dealer(wire["rollout-0"]))
    dealer.send(m.Credits(count=1))
    heard(router)
    router.close()
    second = opened(Router(wire.access))
    dealer.send(m.Credits(count=2))
    assert heard(second) == ("rollout-0", m.Credits(count=2))


def test_the_newer_of_two_with_one_name_is_the_one_that_counts(wire: Wire, opened: Any) -> None:
    router = opened(Router(wire.access))
    old, new = opened(Dealer(wire["rollout-0"])), None
    old.send(m.Heartbeat(progress=1))
    heard(router)
    new = opened(Dealer(wire["rollout-0"]))
    new.send(m.Heartbeat(progress=2))
    assert heard(router) == ("rollout-0", m.Heartbeat(progress=2))
    for version in range(50):
        old.send(m.Heartbeat(progress=1))
        assert router.send("rollout-0", m.ReleasePolicy(version=version))
        assert new.receive(PATIENCE) == m.ReleasePolicy(version=version)
    assert old.receive(0.05) is None
    assert router.receive(0.05) is None, "the old one is no longer heard"


@pytest.mark.slow
def test_a_killed_process_is_gone_and_its_next_incarnation_is_heard(
    wire: Wire, opened: Any
) -> None:
    router = opened(Router(wire.access))
    first = opened(Peer(wire["rollout-0"], incarnation=0))
    assert heard(router)[1].incarnation == 0
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(PATIENCE)
    opened(Peer(wire["rollout-0"], incarnation=1))
    assert heard(router)[1].incarnation == 1
    assert router.send("rollout-0", m.ReleasePolicy(version=7))
    assert heard(router) == ("rollout-0", m.ReleasePolicy(version=7))


def test_nobody_is_there_to_send_to(wire: Wire, opened: Any) -> None:
    router = opened(Router(wire.access))
    assert router.send("rollout-9", m.Shutdown(reason="done")) is False
    dealer = Dealer(wire["rollout-0"])
    dealer.send(m.Goodbye())
    heard(router)
    dealer.close()
    deadline = time.monotonic() + PATIENCE
    while router.send("rollout-0", m.ReleasePolicy(version=1)):
        assert time.monotonic() < deadline, "the router still takes messages for a peer that left"
        router.receive(0.01)


def test_goodbye_is_sent_even_when_the_dealer_closes_at_once(wire: Wire, opened: Any) -> None:
    router, dealer = opened(Router(wire.access)), Dealer(wire["rollout-0"])
    dealer.send(m.Goodbye(reason="told to"))
    dealer.close()
    dealer.close()
    assert heard(router) == ("rollout-0", m.Goodbye(reason="told to"))


# ---- peers that do not read ----------------------------------------------------------------------


def fill(router: Router, peer: str, message: m.AnyMessage, most: int) -> int:
    """Send until the router refuses; return how many it took."""
    for taken in range(most):
        if not router.send(peer, message):
            return taken
    raise AssertionError(f"the router took {most} messages for a peer that does not read")


def test_a_peer_that_never_reads_is_refused_and_others_are_served(wire: Wire, opened: Any) -> None:
    limits = Limits(queue=4)
    router = opened(Router(wire.access, limits))
    stuck, lively = (
        opened(Dealer(wire["rollout-0"], limits)),
        opened(Dealer(wire["rollout-1"], limits)),
    )
    for dealer in (stuck, lively):
        dealer.send(m.Credits(count=1))
        heard(router)
    window = m.TrainWindow(step=0, groups=[train_group(100_000)])
    assert fill(router, "rollout-0", window, most=40) >= 4
    assert router.send("rollout-1", m.ReleasePolicy(version=1))
    assert lively.receive(PATIENCE) == m.ReleasePolicy(version=1)
    stuck.receive(PATIENCE)
    stuck.send(m.Credits(count=2))
    assert heard(router) == ("rollout-0", m.Credits(count=2)), "it is still heard"


@pytest.mark.slow
def test_a_stopped_process_holds_up_nobody(wire: Wire, opened: Any) -> None:
    limits = Limits(queue=4)
    router = opened(Router(wire.access, limits))
    peer = opened(Peer(wire["rollout-0"]))
    heard(router)
    peer.process.send_signal(signal.SIGSTOP)
    taken = fill(router, "rollout-0", m.Shutdown(reason="x" * 20_000), most=1000)
    peer.process.send_signal(signal.SIGCONT)
    assert [heard(router)[1].reason for _ in range(taken)] == ["x" * 20_000] * taken, (
        "what was taken arrives"
    )


def test_a_dealer_says_so_when_the_controller_reads_nothing(wire: Wire, opened: Any) -> None:
    limits = Limits(queue=2, send_seconds=0.1, linger_seconds=0.0)
    opened(Router(wire.access, limits))
    dealer = opened(Dealer(wire["rollout-0"], limits))
    with pytest.raises(TimeoutError, match=r"the controller has read nothing for 0\.1 seconds"):
        for _ in range(200):
            dealer.send(result(100_000))


def test_a_dealer_that_is_refused_hears_it_while_it_waits_to_send(unix: Wire, opened: Any) -> None:
    """And not after `send_seconds`, here an hour."""
    blocked, refusals = threading.Event(), list[AccessError]()

    def talk() -> None:
        dealer = Dealer(unix["rollout-0"], Limits(queue=1, send_seconds=3600.0, linger_seconds=0.0))
        with contextlib.closing(dealer):
            dealer.send(m.Credits(count=1))
            blocked.set()
            try:
                dealer.send(m.Credits(count=1))
            except AccessError as refusal:
                refusals.append(refusal)

    talking = threading.Thread(target=talk, daemon=True)
    talking.start()
    assert blocked.wait(PATIENCE)
    time.sleep(0.1)  # so that it mostly waits already
    opened(Router(Wire(unix.address).access))
    talking.join(PATIENCE)
    assert ["does not let rollout-0 in" in str(refusal) for refusal in refusals] == [True]


def test_an_async_dealer_says_so_too(wire: Wire) -> None:
    limits = Limits(queue=2, send_seconds=0.1, linger_seconds=0.0)

    async def talk() -> None:
        dealer = AsyncDealer(wire["rollout-0"], limits)
        try:
            for _ in range(4):
                await dealer.send(m.Credits(count=1))
        finally:
            dealer.close()

    with pytest.raises(TimeoutError, match="the controller has read nothing"):
        asyncio.run(talk())


@pytest.fixture
def storm() -> Iterator[None]:
    """A signal every few milliseconds, taken by a handler that returns; after `PATIENCE` by one
    that raises."""
    end = time.monotonic() + PATIENCE

    def take(number: int, frame: object) -> None:
        if time.monotonic() > end:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise AssertionError("a wait did not end")

    before = signal.signal(signal.SIGALRM, take)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("storm")
def test_waits_end_in_a_storm_of_signals(unix: Wire, opened: Any) -> None:
    limits = Limits(queue=2, send_seconds=0.1, linger_seconds=0.0)
    dealer = opened(Dealer(unix["rollout-0"], limits))
    assert dealer.receive(0.1) is None, "nobody is there"
    with pytest.raises(TimeoutError, match=r"the controller has read nothing for 0\.1 seconds"):
        for _ in range(4):
            dealer.send(m.Credits(count=1))


def train_group(tokens: int) -> TrainGroup:
    rewards = np.ones(1, np.float32)
    return TrainGroup(
        group_id="g", question_id="q", kind="plain", samples=result(tokens).samples, rewards=rewards
    )


# ---- peers without manners -----------------------------------------------------------------------

RUDE = {
    "random bytes": [b"\x00\xff\x13"],
    "nothing in a frame": [b""],
    "random payload": [encode(result(3))[0], b"\x00" * 9],
    "three frames": [b"a", b"b", b"c"],
    "twenty thousand frames": [b"a"] * 20_000,
    "a pickle": [b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94."],
    "unknown tag": [b"\x81\xa4type\xa4Evil"],
    "unknown field": [encode(m.Credits(count=1))[0].replace(b"\x82", b"\x83", 1) + b"\xa1x\x01"],
    "nesting": [b"\x91" * 100_000],
}


@pytest.mark.parametrize("name", RUDE)
def test_malformed_messages_are_counted_and_dropped(unix: Wire, opened: Any, name: str) -> None:
    router, rude = opened(Router(unix.access)), opened(unix.raw_dealer("rollout-0"))
    rude.send_multipart(RUDE[name])
    rude.send_multipart(encode(m.Credits(count=1)))
    assert heard(router) == ("rollout-0", m.Credits(count=1))
    assert router.rejected == 1


def test_of_many_frames_only_one_too_many_is_kept(
    unix: Wire, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router, rude = opened(Router(unix.access)), opened(unix.raw_dealer("rollout-0"))
    rude.send_multipart([b"a"] * 20_000)
    rude.send_multipart(encode(m.Credits(count=1)))
    heard(router)
    assert f"a message has 1 to {MAX_FRAMES} frames, got {MAX_FRAMES + 1}" in caplog.text


@pytest.mark.parametrize(
    "identity", [b"rollout-0", b"trainer", b"\xff\xfe", b"\x00abc", b"x" * 255]
)
def test_who_names_its_own_connection_is_not_heard(
    unix: Wire, opened: Any, identity: bytes
) -> None:
    router, rude = opened(Router(unix.access)), opened(unix.raw_dealer("rollout-1", identity))
    rude.send_multipart(encode(m.Credits(count=1)))
    good = opened(Dealer(unix["rollout-0"]))
    while router.rejected == 0:
        assert router.receive(0.05) is None
    good.send(m.Credits(count=2))
    assert heard(router) == ("rollout-0", m.Credits(count=2))


def test_a_flood_of_rubbish_does_not_keep_the_router(unix: Wire, opened: Any) -> None:
    router, rude = opened(Router(unix.access)), opened(unix.raw_dealer("rollout-0"))
    for _ in range(500):
        rude.send(b"rubbish")
    calls = 0
    while router.rejected < 500:
        assert router.receive(0.0) is None
        calls += 1
    assert calls >= 500, "a call whose time is up looks at one message only"


def test_rejections_are_logged_ever_more_rarely(
    unix: Wire, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router, rude = opened(Router(unix.access)), opened(unix.raw_dealer("rollout-0"))
    for _ in range(100):
        rude.send(b"rubbish")
    rude.send_multipart(encode(m.Credits(count=1)))
    with caplog.at_level(logging.WARNING, logger="zppo_protocol.sockets"):
        heard(router)
    assert router.rejected == 100
    assert [record.args[0] for record in caplog.records] == [1, 2, 4, 8, 16, 32, 64]
    assert "rejected message 1, from rollout-0: not a message" in caplog.text


def test_a_dealer_skips_what_it_cannot_read(wire: Wire, opened: Any) -> None:
    """A router of another version, say, must not bring an actor down."""
    router, dealer = opened(Router(wire.access)), opened(Dealer(wire["rollout-0"]))
    dealer.send(m.Credits(count=1))
    heard(router)
    router._socket.send_multipart([router._routes["rollout-0"], b"rubbish"])
    assert router.send("rollout-0", m.Shutdown(reason="done"))
    assert dealer.receive(PATIENCE) == m.Shutdown(reason="done")
    assert dealer.rejected == 1


def test_an_oversize_frame_never_reaches_the_router(unix: Wire, opened: Any) -> None:
    limits = Limits(header_bytes=10_000, payload_bytes=100_000)
    router, rude = opened(Router(unix.access, limits)), opened(unix.raw_dealer("rollout-0"))
    rude.send(b"x" * 200_000)
    good = opened(Dealer(unix["rollout-1"], limits))
    good.send(m.Credits(count=1))
    assert heard(router) == ("rollout-1", m.Credits(count=1))
    assert router.rejected == 0, "the transport has dropped the connection before reading the frame"
    deadline, got = time.monotonic() + PATIENCE, None
    while got is None:  # what goes out before the connection is dropped is lost with it
        assert time.monotonic() < deadline
        rude.send_multipart(encode(m.Credits(count=2)))
        got = router.receive(0.1)
    assert got == ("rollout-0", m.Credits(count=2)), "the peer connects anew"


def test_a_message_as_large_as_the_limits_comes_through(wire: Wire, opened: Any) -> None:
    message = result(5000)
    [frame] = encode(message)
    header = int.from_bytes(frame[:8], "big")
    limits = Limits(header_bytes=header, payload_bytes=len(frame) - 8 - header - -header % 8)
    router = opened(Router(wire.access, limits))
    opened(Dealer(wire["rollout-0"], limits)).send(message)
    assert heard(router)[1].task_id == message.task_id


def test_an_oversize_header_below_the_frame_limit_is_rejected(wire: Wire, opened: Any) -> None:
    limits = Limits(header_bytes=1_000, payload_bytes=100_000)
    router, peer = opened(Router(wire.access, limits)), opened(Dealer(wire["rollout-0"]))
    peer.send(m.Goodbye(reason="x" * 2_000))
    peer.send(m.Goodbye())
    assert heard(router) == ("rollout-0", m.Goodbye())
    assert router.rejected == 1


def test_what_is_too_large_is_refused_where_it_is_sent(wire: Wire, opened: Any) -> None:
    limits = limits_for(1)
    router, dealer = opened(Router(wire.access, limits)), opened(Dealer(wire["rollout-0"], limits))
    with pytest.raises(ProtocolError, match=f"over the limit of {MIB}"):
        dealer.send(result(200_000))
    dealer.send(result(100_000))
    assert len(heard(router)[1].samples.token_ids) == 100_000


# ---- addresses and names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("inproc://x", r"address 'inproc://x' must start with ipc:// or tcp://"),
        ("/tmp/x.sock", "must start with ipc:// or tcp://"),
        ("ipc://x.sock", "must name an absolute path"),
        ("ipc://@abstract", "must name an absolute path"),
        ("ipc://*", "must name an absolute path"),
        ("ipc:///" + "x" * 107, "longer than the 107 bytes"),
        ("tcp://127.0.0.1", r"must be tcp://HOST:PORT, an IPv6 host in brackets"),
        ("tcp://:5555", "must be tcp://HOST:PORT"),
        ("tcp://::1:5555", "an IPv6 host in brackets"),
        ("tcp://a b:5555", "must be tcp://HOST:PORT"),
        ("tcp://eth0;127.0.0.1:5555", "must be tcp://HOST:PORT"),
        ("tcp://127.0.0.1:0", "must end with a port from 1 to 65535"),
        ("tcp://127.0.0.1:*", "must end with a port from 1 to 65535"),
        ("tcp://127.0.0.1:65536", "must end with a port from 1 to 65535"),
    ],
)
def test_what_is_no_address_is_refused(address: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        issue(address, {"rollout-0": "rollout"})
    with pytest.raises(ValueError, match=sentence):
        Dealer(replace(Wire("ipc:///x/y")["rollout-0"], address=address))


def test_the_longest_path_is_fine() -> None:
    assert ipc_path("ipc:///" + "x" * 106) == Path("/" + "x" * 106)


def test_ipv6_has_brackets() -> None:
    assert tcp_endpoint("tcp://[::1]:5555") == ("[::1]", 5555)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]"])
def test_an_address_for_everybody_is_said(
    host: str, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"tcp://{host}:{free_port()}"
    opened(Router(Wire(address).access))
    assert f"{address} is open on every interface of this host, to holders of a key" in caplog.text


def test_loopback_is_for_nobody_else(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    opened(Router(Wire(f"tcp://127.0.0.1:{free_port()}").access))
    assert caplog.text == ""


def test_a_port_that_is_taken_is_named(opened: Any) -> None:
    wire = Wire(f"tcp://127.0.0.1:{free_port()}")
    opened(Router(wire.access))
    with pytest.raises(AccessError, match=f"^cannot listen at {wire.address}: Address already in"):
        Router(wire.access)


@pytest.mark.parametrize(
    "name", ["", "a b", "../up", "x" * 65, "ü", ".hidden", "a\n", "controller"]
)
def test_names_that_are_no_actor_names(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 letters, digits"):
        issue("ipc:///x/y", {name: "rollout"})


def test_a_folder_that_others_may_enter_is_refused(unix: Wire) -> None:
    folder = ipc_path(unix.address).parent
    folder.chmod(0o755)
    with pytest.raises(AccessError, match=r"must be mine alone \(mode 0700\), its mode is 0755"):
        Router(unix.access)
    with pytest.raises(AccessError, match="does not exist"):
        Router(Wire(f"ipc://{folder}/missing/controller.sock").access)


def test_the_socket_is_private_and_everything_is_given_back(wire: Wire) -> None:
    def held() -> tuple[int, int]:
        """Descriptors and threads of this process."""
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def talk() -> None:
        router, dealer = Router(wire.access), Dealer(wire["rollout-0"])
        if wire.address.startswith("ipc"):
            assert ipc_path(wire.address).stat().st_mode & 0o077 == 0
        dealer.send(m.Credits(count=1))
        heard(router)
        dealer.close()
        router.close()
        router.close()

    talk()
    gc.collect()  # what other tests have left might be given back meanwhile
    before = held()
    for _ in range(5):
        talk()
    deadline = time.monotonic() + PATIENCE
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (before, held())
        time.sleep(0.01)  # a thread that has done its work has still to end


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Router(access)", "Dealer(credentials['rollout-0'])"])
def test_end_dropped_in_a_cycle_does_not_hang_the_collector(wire: Wire, end: str) -> None:
    program = (
        "import gc; from zppo_protocol.keys import issue; "
        "from zppo_protocol.sockets import Dealer, Router\n"
        f"access, credentials = issue({wire.address!r}, {{'rollout-0': 'rollout'}})\n"
        f"cycle = [{end}]; cycle.append(cycle); del cycle; gc.collect()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
