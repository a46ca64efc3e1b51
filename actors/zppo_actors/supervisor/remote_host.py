"""A further host as the supervisor sees it (no sockets, no clock): what is wanted of it, what it
has said, and its processes, each of them a `Process` like one of this host.

Orders and reports each say all there is to say, so a lost one is made good by the next. A host is
*lost* when it has not been heard for a lease, when its agent has left or is another process than
before; its processes have ended then: the agent ends them for the same reasons, by its own clock.
Durations are compared, never the clocks of two hosts.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from zppo_actors.supervisor.vitals import Children, Usage
from zppo_protocol.messages import HostOrders, HostReport
from zppo_protocol.values import ActorOrder, ActorReport

KILLED = -int(signal.SIGKILL)


class RemoteProcess:
    """A process of another host. `reason` says why it ended, where its exit code does not."""

    pid = 0

    def __init__(self, host: RemoteHost, order: ActorOrder) -> None:
        self._host, self.order = host, order
        self._exit_code: int | None = None
        self._used: Usage = (0.0, 0)
        self._seen = self._killed = False
        self.reason = ""

    def poll(self) -> int | None:
        return self._exit_code

    def wait(self) -> int:
        """The exit code; that of a killed process where none is known."""
        return KILLED if self._exit_code is None else self._exit_code

    def kill(self) -> None:
        """Want it no longer: the next orders do not name it."""
        self._killed = True
        self._host.unwanted(self)

    def used(self, children: Children) -> Usage:
        return self._used

    def hear(self, report: ActorReport | None) -> None:
        """What the host says of it; None: it does not name it."""
        if report is not None:
            self._seen = True
            self._used = (report.seconds, report.moved)
            if report.exit_code is not None:
                self._end(report.exit_code)
        elif self._seen or self._killed:
            self._end(KILLED)

    def lose(self, reason: str) -> None:
        """Its host is lost."""
        if self._exit_code is None:
            self.reason = reason
        self._end(KILLED)

    def _end(self, exit_code: int) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code


class RemoteHost:
    """One further host over all attempts of a run. Times are seconds of the supervisor's clock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = ""
        """Which process its agent is; empty: there is none."""
        self.ready = False
        """Whether the agent has checked what it was told to, and reports."""
        self.trouble = ""
        """Why there is none, where it has said so."""
        self._heard = 0.0
        self._attempt, self._record, self._secrets = "", b"", dict[str, bytes]()
        self._reported = ""
        self._wanted: dict[str, ActorOrder] = {}
        self._processes: list[RemoteProcess] = []
        self._fresh = False

    # ---- what is wanted --------------------------------------------------------------------------

    def begin(self, attempt: str, record: bytes, secrets: Mapping[str, bytes]) -> None:
        """An attempt begins; nothing is wanted of an earlier one."""
        self._attempt, self._record, self._secrets = attempt, record, dict(secrets)
        self._wanted, self._processes, self._fresh = {}, [], True

    def end(self) -> None:
        """The attempt is over: all of its processes are to end, and its runtime folder to go."""
        self.begin("", b"", {})

    def start(self, order: ActorOrder) -> RemoteProcess:
        """Want a process. The host must have `ready`."""
        self._wanted[order.name], self._fresh = order, True
        self._processes.append(RemoteProcess(self, order))
        return self._processes[-1]

    def unwanted(self, process: RemoteProcess) -> None:
        """A process is wanted no longer, unless its next incarnation is already."""
        if self._wanted.get(process.order.name) == process.order:
            del self._wanted[process.order.name]
            self._fresh = True
        if process.poll() is not None and process in self._processes:
            self._processes.remove(process)

    def orders(self, received: Mapping[str, tuple[int, int]]) -> HostOrders:
        """All that is wanted now."""
        self._fresh = False
        known = self._reported == self._attempt
        return HostOrders(
            attempt=self._attempt,
            record=b"" if known else self._record,
            secrets={} if known else self._secrets,
            actors=list(self._wanted.values()),
            received=dict(received),
        )

    @property
    def fresh(self) -> bool:
        """Whether there is something that the host has not been told."""
        return self._fresh

    @property
    def clean(self) -> bool:
        """Whether nothing of the last attempt is left there; of a lost host nobody knows."""
        return not self.life or (not self._attempt and not self._reported)

    # ---- what is heard ---------------------------------------------------------------------------

    def greet(self, life: str, now: float) -> None:
        """An agent says who it is, perhaps again; an earlier one is lost."""
        self.life, self.trouble, self._heard, self._fresh = life, "", now, True

    def report(self, report: HostReport, now: float) -> None:
        """An agent that has greeted says how things stand."""
        self.ready, self._heard, self._reported = True, now, report.attempt
        if report.attempt != self._attempt:
            return
        said = {(one.name, one.incarnation): one for one in report.actors}
        for process in self._processes:
            process.hear(said.get((process.order.name, process.order.incarnation)))

    def lose(self, reason: str) -> None:
        """There is no agent any more."""
        self.life, self.ready, self._reported, self.trouble = "", False, "", reason
        self._wanted.clear()
        processes, self._processes = self._processes, []
        for process in processes:
            process.lose(reason)

    def silent_for(self, now: float) -> float:
        """Seconds since it was last heard; 0 where there is no agent to be heard."""
        return now - self._heard if self.life else 0.0
