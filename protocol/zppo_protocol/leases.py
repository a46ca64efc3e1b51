"""Leases: who works on which task, since when, and whose answer counts.

Invariants: a task has at most one lease at a time; only the present holder (actor and incarnation)
may answer, and only once; and a task leaves the ledger by exactly one of `accept`, `drop`, or by
being handed back to the caller for another try (`expired`, `release`, `release_actor`), so none is
lost and none is done twice. Pure: time is an argument, in seconds of any monotonic clock. Leases
are no part of a checkpoint: whatever was leased is issued again on resume.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from msgspec import Struct

from zppo_protocol.errors import ProtocolError

Task = TypeVar("Task")


class Lease(Struct, Generic[Task], frozen=True, kw_only=True):
    """One try at one task. `attempt` counts from 1; `issued` is in seconds of the caller's
    clock."""

    task_id: str
    actor: str
    incarnation: int
    attempt: int
    issued: float
    payload: Task


class LeaseLedger(Generic[Task]):
    """All leases of a run. A lease ends when its actor shows no progress for `lease_seconds`."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._leases: dict[str, Lease[Task]] = {}
        self._by_actor: dict[str, dict[str, Lease[Task]]] = {}
        self._progress: dict[tuple[str, int], float] = {}
        self._attempts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._leases

    def issue(
        self, task_id: str, actor: str, incarnation: int, now: float, payload: Task
    ) -> Lease[Task]:
        """Lease a task that nobody holds. Raises ProtocolError if somebody does."""
        if task_id in self._leases:
            raise ProtocolError(
                f"task {task_id!r} is already leased to {self._leases[task_id].actor}"
            )
        attempt = self.attempts(task_id) + 1
        lease = Lease(
            task_id=task_id,
            actor=actor,
            incarnation=incarnation,
            attempt=attempt,
            issued=now,
            payload=payload,
        )
        self._attempts[task_id] = attempt
        self._leases[task_id] = lease
        self._by_actor.setdefault(actor, {})[task_id] = lease
        return lease

    def progress(self, actor: str, incarnation: int, now: float) -> None:
        """The actor did real work: all its leases of this incarnation start afresh."""
        self._progress[actor, incarnation] = max(now, self._progress.get((actor, incarnation), now))

    def accept(self, task_id: str, actor: str, incarnation: int) -> Task | None:
        """Return the payload if the answer comes from the present holder, and end the task; else
        None: discard it."""
        lease = self.release(task_id, actor, incarnation)
        if lease is None:
            return None
        del self._attempts[task_id]
        return lease.payload

    def release(self, task_id: str, actor: str, incarnation: int) -> Lease[Task] | None:
        """The holder says it failed: take the lease back for another try. None if the speaker is
        not the holder."""
        lease = self._leases.get(task_id)
        if lease is None or (lease.actor, lease.incarnation) != (actor, incarnation):
            return None
        self._remove(lease)
        return lease

    def drop(self, task_id: str) -> None:
        """Give the task up, leased or not: no answer will count, and its attempts are forgotten."""
        lease = self._leases.get(task_id)
        if lease is not None:
            self._remove(lease)
        self._attempts.pop(task_id, None)

    def expired(self, now: float) -> list[Lease[Task]]:
        """Take back the leases whose actor has shown no progress for `lease_seconds`, in the order
        they were issued."""
        over = [
            lease
            for lease in self._leases.values()
            if now - self._last_sign(lease) >= self.lease_seconds
        ]
        for lease in over:
            self._remove(lease)
        return over

    def release_actor(self, actor: str) -> list[Lease[Task]]:
        """The actor is gone: take back all its leases, in the order they were issued."""
        gone = list(self._by_actor.get(actor, {}).values())
        for lease in gone:
            self._remove(lease)
        return gone

    def attempts(self, task_id: str) -> int:
        """How often the task was issued so far; 0 for one that is unknown, accepted or dropped."""
        return self._attempts.get(task_id, 0)

    def held_by(self, actor: str) -> list[str]:
        """Ids of the tasks `actor` holds, in the order they were issued."""
        return list(self._by_actor.get(actor, {}))

    def holder(self, task_id: str) -> Lease[Task] | None:
        return self._leases.get(task_id)

    def _last_sign(self, lease: Lease[Task]) -> float:
        return max(lease.issued, self._progress.get((lease.actor, lease.incarnation), lease.issued))

    def _remove(self, lease: Lease[Task]) -> None:
        del self._leases[lease.task_id]
        held = self._by_actor[lease.actor]
        del held[lease.task_id]
        if not held:
            del self._by_actor[lease.actor]
