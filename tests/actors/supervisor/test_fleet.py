"""Further hosts that do what no agent does; the rest is in `tests/actors/hosts/`."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from zppo_actors.own_time import OwnTime
from zppo_actors.supervisor import fleet as fleets
from zppo_actors.supervisor.fleet import Fleet
from zppo_protocol.messages import PROTOCOL_VERSION, AnyMessage, HostHello, HostOrders, HostReport

REPORT = HostReport(attempt="", actors=[], parts=[])


class Flood:
    """A router into which n1 sends reports faster than they are read."""

    def __init__(self) -> None:
        self.first = deque[tuple[str, AnyMessage]]()
        self.flows, self.sent = False, list[tuple[str, AnyMessage]]()

    def receive(self, _: float) -> tuple[str, AnyMessage] | None:
        if self.first:
            return self.first.popleft()
        return ("n1", REPORT) if self.flows else None

    def send(self, peer: str, message: AnyMessage) -> bool:
        self.sent.append((peer, message))
        return True


def test_hosts_are_not_lost_while_the_supervisor_stands_still(tmp_path: Path) -> None:
    """They may have stood still with it; those that are not heard afterwards are."""
    clock, router = [1e6], Flood()
    fleet = Fleet(router, {"n1": {}}, {}, tmp_path, 60.0)  # type: ignore[arg-type]
    fleet._time = OwnTime(lambda: clock[0])
    hello = HostHello(protocol_version=PROTOCOL_VERSION, host="n1", life="1", versions={})
    router.first += [("n1", hello), ("n1", REPORT)]
    assert fleet.turn() == ["n1 has joined"]
    clock[0] += 86_400.0
    assert fleet.turn() == [] and fleet.is_there("n1")
    said = []
    while not said:
        clock[0] += 1.0
        said = fleet.turn()
    assert said == ["n1 was not heard for 63 s"] and clock[0] < 1e6 + 86_400.0 + 60.0


def test_a_host_that_sends_without_end_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is heeded between two turns. A word of another host that still waits counts."""
    monkeypatch.setattr(fleets, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(fleets, "SPARE_BEATS", 0)
    router = Flood()
    fleet = Fleet(router, {"n1": {}, "n2": {}}, {}, tmp_path, 0.0)  # type: ignore[arg-type]
    for name in ("n1", "n2"):
        hello = HostHello(protocol_version=PROTOCOL_VERSION, host=name, life=name, versions={})
        router.first += [(name, hello), (name, REPORT)]
    router.flows = True
    assert fleet.turn() == ["n1 has joined", "n2 has joined"]
    assert {name for name, said in router.sent if isinstance(said, HostOrders)} == {"n1", "n2"}
    assert fleet.turn() == []
    router.flows = False
    assert "n2 was not heard for 0 s" in fleet.turn()
