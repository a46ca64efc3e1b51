"""The further hosts of a run: one socket to all of their agents, over all attempts.

Consumes `HostHello`, `HostReport` and `Goodbye` from the agents. Produces `HostWelcome`,
`HostOrders`, `Rejected` and `Shutdown`, and appends what the reports bring to the files of the run
directory. Waits for nothing; the supervisor looks in between two other things.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Unpack

from zppo.records.clocks import Clocks, read_clocks, write_clocks
from zppo.records.timeline import TIMELINE
from zppo_actors import timeline
from zppo_actors.own_time import OwnTime, Patience
from zppo_actors.supervisor import children
from zppo_actors.supervisor.children import Birth, Child, child_of
from zppo_actors.supervisor.received_files import ReceivedFiles
from zppo_actors.supervisor.remote_host import RemoteHost
from zppo_protocol.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Goodbye,
    HostHello,
    HostReport,
    HostWelcome,
    Rejected,
    Shutdown,
)
from zppo_protocol.sockets import Router
from zppo_protocol.values import ActorOrder

BEAT_SECONDS = 1.0
SPARE_BEATS = 3
"""The supervisor waits so much longer than the agent before it takes a host for lost: the agent
has heard it at most so much later than it was heard."""
TICK_SECONDS = 0.05
TURN_SECONDS = 1.0

log = logging.getLogger("zppo.supervisor")


def versions() -> dict[str, str]:
    """What must be the same on all hosts of a run."""
    return {"zppo": metadata.version("zppo"), "Python": platform.python_version()}


class Fleet:
    """`folders` says which model folders each host needs, by path, and their fingerprints."""

    def __init__(
        self,
        router: Router,
        folders: Mapping[str, Mapping[str, str]],
        versions: Mapping[str, str],
        run_dir: Path,
        lease_seconds: float,
    ) -> None:
        self._router, self._folders, self._versions = router, folders, dict(versions)
        self._hosts = {name: RemoteHost(name) for name in folders}
        self._files = {name: ReceivedFiles(run_dir) for name in folders}
        self._lease_seconds, self._time = lease_seconds, OwnTime()
        self._timelines = run_dir / TIMELINE
        self._clocks = Clocks(timeline.boot(), read_clocks(self._timelines))
        self._clocks_told = True
        self._attempt = ""
        self._due = float("-inf")
        self.keeper: Child | None = None
        """The process by which hosts are held in a Ray cluster; its end is theirs."""

    # ---- hosts -----------------------------------------------------------------------------------

    def turn(self) -> list[str]:
        """Hear what has come, for `TURN_SECONDS` at most, say what is new; returns lines for the
        view."""
        lines: list[str] = []
        all_heard = self._listen(lines, time.monotonic() + TURN_SECONDS)
        now = self._time.now()
        limit = self._lease_seconds + SPARE_BEATS * BEAT_SECONDS
        for host in self._hosts.values():
            if all_heard and host.silent_for(now) > limit:
                lines += self._lose(host, f"{host.name} was not heard for {limit:g} s")
        self._speak(now)
        return lines

    def _listen(self, lines: list[str], until: float) -> bool:
        """Hear what has come; says whether that was all. A host that sends without end keeps the
        supervisor from nothing else."""
        while (received := self._router.receive(0.0)) is not None:
            host = self._hosts.get(received[0])
            if host is not None:
                lines += self._hear(host, received[1], self._time.now())
            if time.monotonic() > until:
                return False
        return True

    def missing(self) -> dict[str, str]:
        """The hosts that are not there, and why, where that is known."""
        return {name: host.trouble for name, host in self._hosts.items() if not host.ready}

    def has(self, name: str) -> bool:
        """Whether it is one of the further hosts."""
        return name in self._hosts

    def is_there(self, name: str) -> bool:
        """Whether processes can be started there now."""
        return self._hosts[name].ready

    def given_up(self) -> str | None:
        """Why the hosts do not come back, in a sentence; None: they may."""
        if self.keeper is None or not self.keeper.ended:
            return None
        [last] = children.tail(self.keeper.log, lines=1) or [""]
        # A keeper that was killed has said nothing: the line is that of an earlier one.
        if last.startswith("cluster.") and self.keeper.exit_code > 0:
            return last
        return (
            "cluster.launcher ray: the process that holds the hosts has lost Ray "
            f"({self.keeper.verdict}), and the hosts with it; expected a Ray cluster whose head "
            "stays"
        )

    # ---- attempts --------------------------------------------------------------------------------

    def begin(
        self, attempt: str, record: bytes, secrets: Mapping[str, Mapping[str, bytes]]
    ) -> None:
        """Tell all hosts of a new attempt; `secrets` are the key files of each host's actors."""
        self._attempt = attempt
        for name, host in self._hosts.items():
            self._files[name].begin()
            host.begin(attempt, record, secrets.get(name, {}))

    def start(self, host: str, **birth: Unpack[Birth]) -> Child:
        """Have a process started; its host `is_there`."""
        order = ActorOrder(birth["name"], birth["role"], birth["incarnation"], dict(birth["env"]))
        self._files[host].allow(birth["name"])
        return child_of(self._hosts[host].start(order), birth)

    def end(self, seconds: float) -> list[str]:
        """End the attempt everywhere, and wait at most `seconds` until the hosts have said that
        nothing of it is left. Returns those that have not: their agents end it when their lease is
        over."""
        for host in self._hosts.values():
            host.end()
        self._wait(seconds, lambda: all(host.clean for host in self._hosts.values()))
        return [name for name, host in self._hosts.items() if not host.clean or not host.ready]

    def dismiss(self) -> None:
        """The run is over: the agents may leave."""
        for name, host in self._hosts.items():
            if host.life:
                self._router.send(name, Shutdown(reason="the run has ended"))

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        patience = Patience(seconds)
        while not done() and not patience.over:
            self.turn()
            time.sleep(TICK_SECONDS)

    # ---- messages --------------------------------------------------------------------------------

    def _hear(self, host: RemoteHost, message: AnyMessage, now: float) -> list[str]:
        match message:
            case HostHello():
                return self._greet(host, message, now)
            case HostReport() if host.life:
                # What is late of an earlier attempt counts from another beginning.
                for part in message.parts if message.attempt == self._attempt else ():
                    self._files[host.name].take(part)
                fresh = not host.ready
                host.report(message, now)
                # Where spans of this host belong.
                if self._clocks.hear(message.boot, message.clock, time.monotonic()):
                    self._clocks_told = False
                return [f"{host.name} has joined"] if fresh else []
            case HostReport():
                self._router.send(host.name, Rejected(reason=GREET_ANEW))
            case Goodbye():
                reason = message.reason or "it was told to"
                return self._lose(host, f"the agent of {host.name} has left: {reason}")
            case _:
                log.warning("%s sent a %s", host.name, type(message).__name__)
        return []

    def _write_clocks(self) -> None:
        """A disk that does not take it costs the place of spans."""
        self._clocks_told = True
        try:
            write_clocks(self._timelines, self._clocks.known)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self._timelines, error.strerror)

    def _greet(self, host: RemoteHost, hello: HostHello, now: float) -> list[str]:
        problem = self._problem(host.name, hello)
        if problem is not None:
            said, host.trouble = host.trouble, problem
            self._router.send(host.name, Rejected(reason=problem))
            return [problem] if problem != said else []
        lost = []
        if host.life not in ("", hello.life):
            lost = self._lose(host, f"the agent of {host.name} was started anew")
        host.greet(hello.life, now)
        self._router.send(
            host.name,
            HostWelcome(
                beat_seconds=BEAT_SECONDS,
                lease_seconds=self._lease_seconds,
                folders=dict(self._folders[host.name]),
            ),
        )
        return lost

    def _problem(self, name: str, hello: HostHello) -> str | None:
        """Why this host cannot take part, or None."""
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"{name} speaks protocol version {hello.protocol_version}, this run speaks "
                f"{PROTOCOL_VERSION}; install the same version of zppo there"
            )
        for package, version in self._versions.items():
            found = hello.versions.get(package, "none")
            if found != version:
                return (
                    f"{name} has {package} {found}, the controller's host has {version}; install "
                    "the same there"
                )
        return None

    def _lose(self, host: RemoteHost, reason: str) -> list[str]:
        log.warning("%s", reason)
        host.lose(reason)
        self._files[host.name].begin_anew()
        return [reason]

    def _speak(self, now: float) -> None:
        due = now >= self._due
        if due:
            self._due = now + BEAT_SECONDS
            if not self._clocks_told:
                self._write_clocks()
        for name, host in self._hosts.items():
            if host.ready and (due or host.fresh):
                self._router.send(name, host.orders(self._files[name].received))


GREET_ANEW = "greet anew"
"""Not a refusal: the supervisor has taken the host for lost while its agent lived."""
