"""An agent whose host stood still: that it has heard nobody says nothing of the run."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from zppo.signals import Interrupts
from zppo_actors.hosts import agent as agents
from zppo_actors.hosts.agent import Agent
from zppo_actors.own_time import OwnTime
from zppo_protocol.messages import AnyMessage, HostOrders, HostReport, HostWelcome

LEASE_SECONDS = 60.0


class Scripted:
    """A line on which the supervisor says what it is given."""

    def __init__(self) -> None:
        self.inbox, self.sent = deque[AnyMessage](), list[AnyMessage]()

    def send(self, message: AnyMessage) -> None:
        self.sent.append(message)

    def receive(self, timeout_s: float) -> AnyMessage | None:
        return self.inbox.popleft() if self.inbox else None

    def close(self) -> None: ...


class Attempt:
    """Processes of one attempt, as far as the agent knows."""

    run_id, has_news, closed = "a1", False, False

    def __init__(self, *_: object) -> None: ...

    def obey(self, orders: HostOrders) -> None: ...

    def report(self, received: object, *, files: bool) -> HostReport:
        return HostReport(attempt="a1", actors=[], parts=[])

    def close(self) -> None:
        self.closed = True


def test_processes_end_after_a_lease_that_the_agent_has_lived_through(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(agents, "HostAttempt", Attempt)
    line, clock = Scripted(), [1e6]
    agent = Agent("n1", lambda: line, 600.0, Interrupts(), lambda folders: None)
    agent._time = OwnTime(lambda: clock[0])
    agent._heard = agent._time.now()
    welcome = HostWelcome(beat_seconds=1.0, lease_seconds=LEASE_SECONDS, folders={})
    line.inbox += [welcome, HostOrders("a1", b"record", {}, [], {})]
    agent._turn()
    attempt = agent._attempt
    assert isinstance(attempt, Attempt) and not attempt.closed
    clock[0] += 86_400.0
    agent._turn()
    assert agent._attempt is attempt
    begun = clock[0]
    while agent._attempt is attempt:
        clock[0] += 1.0
        agent._turn()
    assert attempt.closed and 40.0 < clock[0] - begun <= LEASE_SECONDS + 1.0
