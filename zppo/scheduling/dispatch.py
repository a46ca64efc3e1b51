"""Who gets which job: queues, credits, leases and loaded policy versions of the workers (sans-IO).

Invariants kept here:

- nothing is assigned without credit, and credit is spent exactly once per assignment;
- an engine gets a job only if the policy version it has loaded is at least the job's `min_version`;
- a job is always in exactly one place: queued, leased to one worker, or finished; a lost worker's
  jobs go back to the queue, and a result is accepted only from the worker that holds the lease.

Jobs are assigned in the order of their priority, and a job that does not fit yet is never overtaken
in its pool: letting smaller jobs pass would starve the large ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable

from msgspec import Struct

from zppo.scheduling.free_workers import FreeWorkers
from zppo_protocol.credits import CreditBook
from zppo_protocol.leases import Lease, LeaseLedger
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask
from zppo_protocol.values import FROZEN


class Job(Struct, frozen=True, kw_only=True):
    """One unit of work. `order` sorts the queue of its pool; `cost` is in credits."""

    id: str
    pool: str
    order: tuple[int, ...]
    cost: int
    message: GenerateTask | GradeTask | ScoreTask
    min_version: int = FROZEN


class Assignment(Struct, frozen=True):
    worker: str
    job: Job


class Worker(Struct, kw_only=True):
    """A live incarnation of an actor. `version` is the policy version it acknowledged; FROZEN
    until it does, as that of a teacher stays."""

    name: str
    pool: str
    incarnation: int
    version: int = FROZEN


class Dispatcher:
    """`current` gives a job at the head of its queue as it is to be handed out now. `admits` has
    the last word on a job that could be: what it refuses stays where it is."""

    def __init__(
        self,
        lease_seconds: float,
        admits: Callable[[Job], bool] = lambda job: True,
        current: Callable[[Job], Job] = lambda job: job,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.reissued = 0
        self._credits = CreditBook()
        self._free: defaultdict[str, FreeWorkers] = defaultdict(FreeWorkers)
        self._leases: LeaseLedger[Job] = LeaseLedger(lease_seconds)
        self._queues: dict[str, list[tuple[tuple[int, ...], int, str]]] = {}
        self._queued: dict[str, Job] = {}
        self._sequence = itertools.count()
        self._admits, self._current = admits, current

    # ---- workers ---------------------------------------------------------------------------------

    def join(self, name: str, pool: str, incarnation: int, version: int = FROZEN) -> list[str]:
        """A worker greets. An earlier incarnation of the same name is gone, and its jobs are queued
        again. Returns their ids."""
        lost = self.leave(name) if name in self.workers else []
        self.workers[name] = Worker(name=name, pool=pool, incarnation=incarnation, version=version)
        self._changed(name)
        return lost

    def leave(self, name: str) -> list[str]:
        """A worker is gone; its jobs are queued again. Returns their ids."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            self._free[worker.pool].remove(name)
        self._credits.forget(name)
        return self._queue_again(self._leases.release_actor(name))

    def grant(self, name: str, count: int) -> None:
        if name in self.workers:
            self._credits.grant(name, count)
            self._changed(name)

    def loaded(self, name: str, version: int) -> None:
        if name in self.workers:
            self.workers[name].version = version
            self._changed(name)

    def progress(self, name: str, now: float) -> None:
        """The worker did real work: all its leases start anew."""
        if name in self.workers:
            self._leases.progress(name, self.workers[name].incarnation, now)

    def expire(self, now: float) -> dict[str, list[str]]:
        """Queue again the jobs of workers without progress for the lease time: worker -> ids of its
        jobs."""
        expired = self._leases.expired(now)
        self._queue_again(expired)
        late: dict[str, list[str]] = {}
        for lease in expired:
            late.setdefault(lease.actor, []).append(lease.task_id)
        return late

    def forgotten(self, name: str, known: Iterable[str], now: float) -> list[str]:
        """Queue again the jobs that a worker has held for the lease time and does not speak of, and
        return their ids.

        `known` are the jobs it says it holds. A job that was lost on the way shows here although
        the worker is busy.
        """
        named = set(known)
        held = [
            self._leases.holder(job_id)
            for job_id in self._leases.held_by(name)
            if job_id not in named
        ]
        old = [
            lease
            for lease in held
            if lease is not None and now - lease.issued >= self._leases.lease_seconds
        ]
        for lease in old:
            self._leases.release(lease.task_id, lease.actor, lease.incarnation)
        return self._queue_again(old)

    # ---- jobs ------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job. Submitting one that is queued already does nothing."""
        if job.id not in self._queued:
            self._queued[job.id] = job
            queue = self._queues.setdefault(job.pool, [])
            heapq.heappush(queue, (job.order, next(self._sequence), job.id))

    def assign(self, now: float) -> list[Assignment]:
        """Hand out as many queued jobs as credits and versions allow."""
        return [
            assignment for pool in sorted(self._queues) for assignment in self._assign(pool, now)
        ]

    def accept(self, job_id: str, worker: str, incarnation: int) -> Job | None:
        """The job if this worker holds its lease, exactly once; None for a late or foreign
        answer."""
        return self._leases.accept(job_id, worker, incarnation)

    def leased(self, job_id: str, worker: str, incarnation: int) -> Job | None:
        """The job if this worker holds its lease now."""
        lease = self._leases.holder(job_id)
        held = lease is not None and (lease.actor, lease.incarnation) == (worker, incarnation)
        return lease.payload if lease is not None and held else None

    def give_back(self, job_id: str, worker: str, incarnation: int) -> Job | None:
        """The worker could not do it: end its lease, without queueing the job again. None for a
        foreign answer."""
        lease = self._leases.release(job_id, worker, incarnation)
        return lease.payload if lease is not None else None

    def drop(self, job_id: str) -> None:
        """No more tries for a job that was given back."""
        self._leases.drop(job_id)

    def attempts(self, job_id: str) -> int:
        """How often the job was assigned so far."""
        return self._leases.attempts(job_id)

    def queued(self, pool: str) -> int:
        return len(self._queues.get(pool, []))

    def head(self, pool: str) -> Job | None:
        """The job of a pool that is handed out next."""
        queue = self._queues.get(pool)
        return self._queued[queue[0][2]] if queue else None

    def leases(self, worker: str) -> int:
        return len(self._leases.held_by(worker))

    def holder(self, job_id: str) -> str | None:
        """The worker that holds the job now, or None if it is queued or unknown."""
        lease = self._leases.holder(job_id)
        return lease.actor if lease is not None else None

    def credits(self, worker: str) -> int:
        return self._credits.available(worker)

    def _queue_again(self, leases: list[Lease[Job]]) -> list[str]:
        self.reissued += len(leases)
        for lease in leases:
            self.submit(lease.payload)
        return [lease.task_id for lease in leases]

    def _assign(self, pool: str, now: float) -> list[Assignment]:
        assignments = []
        queue, free = self._queues[pool], self._free[pool]
        while queue:
            job = self._current(self._queued[queue[0][2]])
            name = free.best(job.min_version, job.cost)
            if name is None or not self._admits(job):
                break
            heapq.heappop(queue)
            del self._queued[job.id]
            self._credits.spend(name, job.cost)
            self._changed(name)
            self._leases.issue(job.id, name, self.workers[name].incarnation, now, job)
            assignments.append(Assignment(name, job))
        return assignments

    def _changed(self, name: str) -> None:
        """What a worker has loaded or may be given is another than before."""
        worker = self.workers[name]
        self._free[worker.pool].put(name, worker.version, self._credits.available(name))
