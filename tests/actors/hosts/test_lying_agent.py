"""An agent that has a key of the run and says what no agent says: the supervisor goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zppo_actors.supervisor import received_files
from zppo_actors.supervisor.children import Child
from zppo_actors.supervisor.fleet import Fleet, versions
from zppo_actors.supervisor.gathering import LIMITS, ROLE
from zppo_protocol import keys
from zppo_protocol.errors import ProtocolError
from zppo_protocol.messages import PROTOCOL_VERSION, HostHello, HostReport, HostWelcome
from zppo_protocol.sockets import Dealer, Router
from zppo_protocol.values import ActorReport, FilePart

HOST = "node-1"
LOG = "logs/grader-0.log"
PATIENCE_SECONDS = 600.0


class Liar:
    """A real line between a fleet and the test, which plays the agent."""

    def __init__(self, folder: Path) -> None:
        sockets = folder / "sockets"
        sockets.mkdir(mode=0o700)
        access, credentials = keys.issue(f"ipc://{sockets / 's'}", {HOST: ROLE})
        self.run = folder / "run"
        self.log = self.run / LOG
        self.router = Router(access, LIMITS)
        self.fleet = Fleet(self.router, {HOST: {}}, versions(), self.run, 3600.0)
        self.dealer = Dealer(credentials[HOST], LIMITS)

    def greet(self, life: str) -> None:
        hello = HostHello(
            protocol_version=PROTOCOL_VERSION, host=HOST, life=life, versions=versions()
        )
        self.dealer.send(hello)
        self.until(lambda: isinstance(self.dealer.receive(0.0), HostWelcome))
        self.say()
        self.until(lambda: self.fleet.is_there(HOST))

    def begin(self) -> Child:
        self.log.parent.mkdir(parents=True)
        self.greet("first")
        self.fleet.begin("attempt", b"record", {})
        return self.fleet.start(
            HOST, name="grader-0", role="grader", incarnation=0, log=self.log, env={}
        )

    def say(
        self, *parts: FilePart, actors: tuple[ActorReport, ...] = (), attempt: str = ""
    ) -> None:
        self.dealer.send(HostReport(attempt=attempt, actors=list(actors), parts=list(parts)))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            self.fleet.turn()
            time.sleep(0.002)

    def written(self, mark: bytes) -> Callable[[], bool]:
        return lambda: self.log.exists() and mark in self.log.read_bytes()

    def close(self) -> None:
        self.dealer.close()
        self.router.close()


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    liar = Liar(tmp_path)
    yield liar
    liar.close()


def ended(exit_code: int) -> ActorReport:
    return ActorReport("grader-0", 0, 1, exit_code, 0.0, 0)


@pytest.mark.parametrize("number", [40, int(signal.SIGTERM)])
def test_a_signal_without_a_name(liar: Liar, number: int) -> None:
    child = liar.begin()
    liar.say(actors=(ended(-number),), attempt="attempt")
    liar.until(lambda: child.ended)
    name = "SIGTERM" if number == signal.SIGTERM else f"signal {number}"
    assert child.verdict == f"grader-0 was killed by {name}"


@pytest.mark.parametrize("code", [-65, 256, -(2**60)])
def test_no_process_ends_with_such_a_code(liar: Liar, code: int) -> None:
    with pytest.raises(ProtocolError):
        liar.say(actors=(ended(code),))


def test_a_part_from_the_far_end_can_be_answered(liar: Liar) -> None:
    """What is told of it next is a number that the wire carries."""
    liar.begin()
    liar.say(FilePart(LOG, 2**53, 2**53 - 2**20, b"far" * 300_000), attempt="attempt")
    liar.until(liar.written(b"far"))
    liar.greet("second")  # orders have been given with it, and are again
    with pytest.raises(ProtocolError):
        liar.say(FilePart(LOG, 0, 2**53 - 2**20 + 1, b""))


def test_neither_gaps_nor_new_lives_make_a_log_grow(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received_files, "MOST_BYTES", 100)
    child = liar.begin()
    child.log.write_bytes(b"earlier\n")
    for life in range(20):
        for start in range(0, 300, 30):
            liar.say(FilePart(LOG, 0, start, b"more"), attempt="attempt")
        liar.greet(str(life))
    assert liar.log.read_bytes().startswith(b"earlier\nmore\n[26 bytes are left out]\n")
    assert len(liar.log.read_bytes()) <= len(b"earlier\n") + 100


def test_what_is_late_of_an_earlier_attempt_is_not_taken_for_this_one(liar: Liar) -> None:
    liar.begin()
    liar.fleet.begin("next", b"record", {})
    liar.say(FilePart(LOG, 0, 500, b"late"), attempt="attempt")
    liar.say(FilePart(LOG, 0, 0, b"this one"), attempt="next")
    liar.until(liar.written(b"this one"))
    assert liar.log.read_bytes() == b"this one"
