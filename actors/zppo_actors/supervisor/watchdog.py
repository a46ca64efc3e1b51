"""Which processes are stuck: those that neither speak nor do anything, though they should.

The controller watches all other actors by what they say. The supervisor watches what cannot be
heard: an actor that is starting (it loads a model and says nothing), and the controller itself,
which speaks twice a second. A silent process is judged by what it uses, so that loading may take
as long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from zppo.config.topology import Topology
from zppo_actors.supervisor.children import Child
from zppo_actors.supervisor.vitals import Vitals, children_by_parent
from zppo_protocol.messages import Status

CONTROLLER, TRAINER = "controller", "trainer"
UNHEARD = "rank"
"""Greets nobody; when it stands still, so does the trainer, which is heard."""
LOOK_SECONDS = 2.0
STOPPING_SECONDS = 120.0
"""A controller that was asked to stop and is as if dead is not waited for any longer than this."""


class Stuck(NamedTuple):
    child: Child
    reason: str


class Watchdog:
    """Looks at the processes of one attempt, at most every `LOOK_SECONDS`."""

    def __init__(self, topology: Topology) -> None:
        self._start_seconds = topology.actors.start_seconds
        self._lease_seconds = topology.scheduler.lease_seconds
        self._no_progress_seconds = topology.run.no_progress_seconds
        self._vitals = Vitals()
        self._greeted: set[tuple[str, int]] = set()
        self._known: set[str] = set()
        self._heard: float | None = None
        self._due = float("-inf")

    def heard(self, status: Status, now: float) -> None:
        """The controller lives, and says who has greeted it."""
        self._heard = now
        self._known = {actor.actor for actor in status.actors}
        self._greeted.update((actor.actor, actor.incarnation) for actor in status.actors)

    @property
    def has_heard(self) -> bool:
        """Whether the controller has said anything."""
        return self._heard is not None

    def unheard(self, children: Iterable[Child]) -> list[Child]:
        """Those that the controller did not know when it spoke last, and cannot tell anything: they
        are still starting. A rank is told by the trainer, and shares its lot."""
        return [
            child
            for child in children
            if child.role != CONTROLLER
            and (TRAINER if child.role == UNHEARD else child.name) not in self._known
        ]

    def due(self, now: float) -> bool:
        """Whether it is time to look; if so the next time is counted from now."""
        if now < self._due:
            return False
        self._due = now + LOOK_SECONDS
        return True

    def look(self, children: Iterable[Child], now: float) -> list[str]:
        """Sample all processes; returns the names of those that did something since the last
        look."""
        table = children_by_parent()
        watched = list(children)
        self._vitals.sample({child.key: child.process.used(table) for child in watched}, now)
        return [one.name for one in watched if self._vitals.still_for(one.key, now) == 0.0]

    def stuck(self, children: Iterable[Child], now: float, *, stopping: bool) -> list[Stuck]:
        """Those that must be killed, and why."""
        reasons = ((child, self._reason(child, now, stopping)) for child in children)
        return [Stuck(child, reason) for child, reason in reasons if reason]

    def _reason(self, child: Child, now: float, stopping: bool) -> str:
        still = self._vitals.still_for(child.key, now)
        if child.role == CONTROLLER and self._heard is not None:
            patience = min(self._lease_seconds, STOPPING_SECONDS if stopping else float("inf"))
            silent = now - self._heard
            if min(silent, still) >= patience:
                return f"it said and did nothing for {patience:g} s"
            if silent >= self._no_progress_seconds:
                return f"it said nothing for {self._no_progress_seconds:g} s"
            return ""
        if child.role == UNHEARD:
            return ""
        if child.role != CONTROLLER and self._heard is None:
            return ""  # nobody can greet a controller that is itself still loading
        starting = (child.name, child.incarnation) not in self._greeted
        if starting and still >= self._start_seconds:
            return f"it neither computed nor read for {self._start_seconds:g} s while it started"
        return ""
