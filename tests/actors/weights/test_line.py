"""Weights from one folder into another over a real line: whole, resumed, damaged, given up; and who
is not let in."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from zppo_actors.weights import fetch, fetcher, line, server, shared_memory
from zppo_actors.weights.fetcher import Fetcher
from zppo_actors.weights.layout import weight_path
from zppo_actors.weights.recycling import set_aside
from zppo_actors.weights.server import WeightServer
from zppo_protocol import messages
from zppo_protocol.values import PolicyManifest

SMALL = 1 << 12
PATIENCE = 600.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of few bytes."""
    monkeypatch.setattr(fetch.WeightFetch.__init__, "__defaults__", (SMALL, 4))
    monkeypatch.setattr(fetcher, "RETRY_SECONDS", (0.01, 0.05))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The trainer's runtime folder."""
    (folder := tmp_path / "home").mkdir()
    return folder


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """The runtime folder of another host."""
    (folder := tmp_path / "away").mkdir()
    return folder


@pytest.fixture
def served(home: Path) -> Iterator[WeightServer]:
    serving = WeightServer(home, "127.0.0.1")
    yield serving
    serving.close()


def address_of(serving: WeightServer) -> tuple[str, int]:
    return serving.source.host, serving.source.port


def published(home: Path, version: int, *, seed: int = 0, tensors: int = 6) -> PolicyManifest:
    generator = torch.Generator().manual_seed(seed + version)
    found = {
        f"t{number}": torch.randn(number * 7, 501, generator=generator).to(torch.bfloat16)
        for number in range(tensors)
    }
    return shared_memory.publish(found, version, home)


def arrived(fetching: Fetcher) -> PolicyManifest:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = fetching.step(0.2)
        if found is not None:
            return found
    raise AssertionError("nothing came")


def test_a_version_comes_as_it_was_published(home: Path, away: Path, served: WeightServer) -> None:
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    for version in (1, 2):
        manifest = published(home, version)
        fetching.want(manifest)
        assert fetching.busy
        assert arrived(fetching) == manifest and not fetching.busy
        assert fetching.step(0.0) is None
        there = weight_path(away, version)
        assert there.read_bytes() == weight_path(home, version).read_bytes()
        # An engine of that host opens it as ever.
        shared_memory.open_policy(msgspec.structs.replace(manifest, path=str(there)))
    assert sorted(path.name for path in away.iterdir()) == ["policy-1.bin", "policy-2.bin"]
    assert sorted(path.name for path in home.iterdir()) == ["policy-1.bin", "policy-2.bin"]
    assert served.refused == 0
    fetching.close()


def test_a_version_comes_onto_the_pages_of_a_released_one(
    home: Path, away: Path, served: WeightServer
) -> None:
    fetching, inodes = Fetcher(away), []
    fetching.come_from(served.source)
    for version, tensors in ((1, 6), (2, 5), (3, 4), (4, 6)):
        fetching.want(published(home, version, tensors=tensors))
        arrived(fetching)
        there = weight_path(away, version)
        assert there.read_bytes() == weight_path(home, version).read_bytes()
        inodes.append(there.stat().st_ino)
        set_aside(weight_path(away, version - 1))
    assert inodes[2:] == inodes[:2] and inodes[0] != inodes[1]
    fetching.close()


def cut_after(monkeypatch: pytest.MonkeyPatch, chunks: list[int]) -> None:
    """The server hangs up after so many chunks of a line, once for each number."""
    sent, answer = [0], WeightServer._read

    def read(self: WeightServer, version: int, start: int, size: int) -> bytes:
        sent[0] += 1
        if chunks and sent[0] > chunks[0]:
            chunks.pop(0)
            sent[0] = 0
            raise ConnectionResetError("cut")
        return answer(self, version, start, size)

    monkeypatch.setattr(WeightServer, "_read", read)


def test_after_a_cut_only_the_rest_comes(
    home: Path, away: Path, served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(monkeypatch, cuts := [5, 1, 7])
    manifest = published(home, 1)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(manifest)
    arrived(fetching)
    assert cuts == []
    size = weight_path(home, 1).stat().st_size
    assert weight_path(away, 1).read_bytes() == weight_path(home, 1).read_bytes()
    assert fetching.bytes_total == size


def test_a_server_that_starts_anew_is_found(home: Path, away: Path, served: WeightServer) -> None:
    """Its key and its token are other ones, and the old ones are of no use."""
    manifest = published(home, 1)
    fetching = Fetcher(away)
    fetching.want(manifest)
    assert fetching.step(0.01) is None, "nobody has said where weights are to be had"
    other = WeightServer(home, "127.0.0.1")
    of_the_old = msgspec.structs.replace(other.source, certificate=served.source.certificate)
    for serving, wrong in (
        (served, msgspec.structs.replace(served.source, token="0" * 64)),
        (other, of_the_old),
    ):
        fetching.come_from(wrong)
        deadline = time.monotonic() + PATIENCE
        while serving.refused == 0:
            assert time.monotonic() < deadline
            assert fetching.step(0.1) is None
    assert fetching.bytes_total == 0
    fetching.come_from(other.source)
    assert arrived(fetching) == manifest
    other.close()


def test_damage_is_fetched_again_and_then_given_up(
    home: Path, away: Path, served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = published(home, 1)
    damages, answer = [1], WeightServer._read

    def read(self: WeightServer, version: int, start: int, size: int) -> bytes:
        piece = answer(self, version, start, size)
        if start == 0 and damages[0]:
            damages[0] -= 1
            return bytes([piece[0] ^ 1]) + piece[1:]
        return piece

    monkeypatch.setattr(WeightServer, "_read", read)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(manifest)
    arrived(fetching)
    assert weight_path(away, 1).read_bytes() == weight_path(home, 1).read_bytes()
    damages[0] = 1000
    fetching.want(published(home, 2))
    with pytest.raises(ValueError, match=r"^tensor 't1' came with other bytes 3 times$"):
        arrived(fetching)
    assert not fetching.busy
    assert [path.name for path in away.iterdir()] == ["policy-1.bin"]


def test_a_newer_version_takes_the_place_of_one_under_way(
    home: Path, away: Path, served: WeightServer
) -> None:
    first, second = published(home, 1), published(home, 2)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(first)
    while fetching.bytes_total == 0:
        assert fetching.step(0.0001) is None
    fetching.want(second)
    assert arrived(fetching) == second
    assert [path.name for path in away.iterdir()] == ["policy-2.bin"]


def test_the_same_version_told_again_goes_on(home: Path, away: Path, served: WeightServer) -> None:
    manifest = published(home, 1)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(manifest)
    while fetching.bytes_total == 0:
        assert fetching.step(0.0001) is None
    fetching.want(manifest)
    assert arrived(fetching) == manifest
    assert fetching.bytes_total == weight_path(home, 1).stat().st_size, "nothing came twice"
    fetching.close()


def test_a_line_that_was_idle_for_long_is_not_taken_for_cut(
    home: Path, away: Path, served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[line.Line] = []

    def connect(source: messages.WeightSource) -> line.Line:
        lines.append(line.connect(source))
        return lines[-1]

    monkeypatch.setattr(fetcher, "connect", connect)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(published(home, 1))
    arrived(fetching)
    lines[0].alive -= 2 * fetcher.SILENT_SECONDS
    fetching.want(published(home, 2))
    while (found := fetching.step(0.0001)) is None:
        pass
    assert found.version == 2 and len(lines) == 1
    fetching.close()


def test_who_does_not_know_where_from_sleeps(
    home: Path, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching = Fetcher(away)
    fetching.want(published(home, 1))

    def sleep(seconds: float) -> None:
        raise InterruptedError(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(InterruptedError) as slept:
        fetching.step(PATIENCE)
    assert slept.value.args[0] > PATIENCE / 2, "all the time that there is"


def test_a_version_that_is_gone_is_asked_for_until_there_is_a_newer_one(
    home: Path, away: Path, served: WeightServer
) -> None:
    gone = published(home, 1)
    weight_path(home, 1).unlink()
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(gone)
    assert fetching.step(0.3) is None and fetching.busy
    fetching.want(published(home, 2))
    assert arrived(fetching).version == 2


def test_a_fetcher_that_starts_anew_takes_what_is_whole(home: Path, away: Path) -> None:
    """A file under its final name is believed if its digests are right; a partial one goes."""
    manifest = published(home, 1)
    weight_path(away, 1).write_bytes(weight_path(home, 1).read_bytes())
    weight_path(away, 2).with_name("policy-2.bin.part").write_bytes(b"half")
    fetching = Fetcher(away)
    fetching.want(manifest)
    assert fetching.busy and fetching.step(0.0) == manifest
    assert [path.name for path in away.iterdir()] == ["policy-1.bin"]
    with weight_path(away, 1).open("r+b") as file:
        file.seek(manifest.tensors[3].start)
        file.write(b"\1\2\3\4")
    fetching.want(manifest)
    assert fetching.step(0.0) is None, "what is damaged is fetched anew"
    fetching.close()


def test_no_room_is_said_before_anything_is_asked(
    home: Path, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    fetching = Fetcher(away)
    manifest = published(home, 1)
    size = weight_path(home, 1).stat().st_size
    with pytest.raises(OSError) as caught:
        fetching.want(manifest)
    assert str(caught.value) == (
        f"{away} has no room for {size} bytes (No space left on device); set ZPPO_RUNTIME_DIR "
        "there to a larger folder, or lower scheduler.max_staleness"
    )
    assert not fetching.busy and list(away.iterdir()) == []


def test_strangers_get_nothing(home: Path, served: WeightServer) -> None:
    published(home, 1)
    request = line.FRAME.pack(1, 0, SMALL)
    rubbish = [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x16\x03\x01\x00\x05\x01"]
    for said in rubbish:
        with socket.create_connection(address_of(served), timeout=PATIENCE) as plain:
            heard = b""
            with contextlib.suppress(OSError):  # the server may have hung up by now
                plain.sendall(said)
                plain.shutdown(socket.SHUT_WR)
                while more := plain.recv(4096):
                    heard += more
            assert len(heard) < 100, "an alert of TLS at the most"
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address_of(served), timeout=PATIENCE) as plain:
        secured = blind.wrap_socket(plain)
        secured.sendall(line.proof_of("wrong") + request)
        assert secured.recv(4096) == b""
    deadline = time.monotonic() + PATIENCE
    while served.refused < len(rubbish) + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.refused == len(rubbish) + 1


def test_many_silent_strangers_are_not_borne(
    served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECT_SECONDS", PATIENCE)
    silent = [
        socket.create_connection(address_of(served), timeout=PATIENCE)
        for _ in range(server.STRANGERS + 1)
    ]
    assert silent[-1].recv(1) == b"", "the last one is closed at once"
    assert threading.active_count() < server.STRANGERS + 20
    for stranger in silent:
        stranger.close()


def test_a_stranger_cannot_hold_its_place_by_speaking_slowly(
    served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of a token that would be right comes in time, all of them do not."""
    monkeypatch.setattr(server, "CONNECT_SECONDS", 0.3)
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(address_of(served), timeout=PATIENCE) as plain,
        contextlib.suppress(OSError),
        blind.wrap_socket(plain) as secured,
    ):
        for byte in line.proof_of(served.source.token):
            secured.sendall(bytes([byte]))
            time.sleep(0.03)
        secured.sendall(line.FRAME.pack(1, 0, SMALL))
        assert secured.recv(4096) == b""
    deadline = time.monotonic() + PATIENCE
    while served.refused == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.refused == 1


def test_a_connection_that_cannot_be_taken_is_not_the_last(
    home: Path, away: Path, served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failures = socket.socket.accept, [24, 103]

    def failing(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise OSError(code := failures.pop(), os.strerror(code))
        return accept(self)

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", failing)
        # The thread waits in the true one, which this wakes.
        socket.create_connection(address_of(served), timeout=PATIENCE).close()
        fetching = Fetcher(away)
        fetching.come_from(served.source)
        fetching.want(manifest := published(home, 1))
        assert arrived(fetching) == manifest and failures == []
        fetching.close()


def test_a_connection_for_which_there_is_no_thread_is_not_the_last(
    home: Path, away: Path, served: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: each gives its place among the strangers back."""
    start, failures = threading.Thread.start, list(range(server.STRANGERS + 1))

    def failing(self: threading.Thread) -> None:
        if failures:
            failures.pop()
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(server, "ACCEPT_PAUSE", 0.0)
    monkeypatch.setattr(threading.Thread, "start", failing)
    fetching = Fetcher(away)
    fetching.come_from(served.source)
    fetching.want(manifest := published(home, 1))
    assert arrived(fetching) == manifest and failures == []
    fetching.close()


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "::"])
def test_where_it_listens_need_not_be_where_it_is_reached(
    home: Path, away: Path, bind: str
) -> None:
    if bind == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    serving = WeightServer(home, "first.example", bind=bind)
    assert serving.source.host == "first.example"
    fetching = Fetcher(away)
    fetching.come_from(msgspec.structs.replace(serving.source, host="127.0.0.1"))
    fetching.want(manifest := published(home, 1))
    assert arrived(fetching) == manifest
    fetching.close()
    serving.close()


def test_the_key_is_nowhere_on_disk(home: Path, served: WeightServer) -> None:
    assert list(home.iterdir()) == [] and "PRIVATE" not in served.source.certificate


def test_the_token_is_not_in_what_is_logged(served: WeightServer) -> None:
    assert served.source.token not in repr(served.source)
