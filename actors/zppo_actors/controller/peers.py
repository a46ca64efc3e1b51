"""Who is connected to the controller: one `Peer` per live incarnation of an actor (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from zppo_protocol.messages import PROTOCOL_VERSION, Hello
from zppo_protocol.values import FROZEN, SUPERVISOR, Role

TRAINER = "trainer"
WEIGHTS = "weights"
NO_WORKERS = (SUPERVISOR, TRAINER, WEIGHTS)
"""Roles that the scheduler has no tasks for."""


class Peer(Struct, kw_only=True):
    name: str
    role: Role
    incarnation: int
    capacity: int
    policy_version: int = FROZEN
    progress: int = 0
    refused: int = 0
    """How many of its answers were not let in."""
    heard: float = 0.0
    """When it last said anything."""
    stats: dict[str, float] = field(default_factory=dict)


class Peers:
    """`roles`, name → role, are those of the keys of this life: no other name may greet, and none
    in another's role."""

    def __init__(self, run_id: str, roles: Mapping[str, str]) -> None:
        self._run_id, self._roles = run_id, roles
        self._peers: dict[str, Peer] = {}
        self._newest: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._peers

    def get(self, name: str) -> Peer | None:
        return self._peers.get(name)

    def heard(self, name: str, now: float) -> None:
        """The peer, if it has greeted, said something."""
        if name in self._peers:
            self._peers[name].heard = now

    def of_role(self, role: str) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.role == role]

    def actors(self) -> list[Peer]:
        """All but the supervisor, by name."""
        return [self._peers[name] for name in sorted(self._peers) if name != SUPERVISOR]

    def problem(self, name: str, hello: Hello) -> str | None:
        """Why this greeting is not accepted, or None."""
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"it speaks protocol version {hello.protocol_version}, this run speaks "
                f"{PROTOCOL_VERSION}"
            )
        if hello.run_id != self._run_id:
            return f"it belongs to run {hello.run_id}, this is run {self._run_id}"
        if hello.actor != name:
            return f"it calls itself {hello.actor} on the connection of {name}"
        if self._roles.get(name) != hello.role:
            return f"this run has no {hello.role} called {name}"
        if hello.incarnation < self._newest.get(name, 0):
            return f"incarnation {hello.incarnation} came after incarnation {self._newest[name]}"
        return None

    def add(self, name: str, hello: Hello, now: float) -> None:
        self._newest[name] = hello.incarnation
        self._peers[name] = Peer(
            name=name,
            role=hello.role,
            incarnation=hello.incarnation,
            capacity=hello.capacity,
            heard=now,
        )

    def forget(self, name: str) -> Peer | None:
        return self._peers.pop(name, None)
