"""The dispatcher against a naive one, which scans every worker for every job."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.scheduling.dispatch import Dispatcher, Job
from zppo.scheduling.free_workers import FreeWorkers
from zppo_protocol.messages import GradeTask

NAMES = ("a", "ab", "b", "w-1", "w-10", "w-2", "é")
POOLS = ("student", "teacher")

NAME, POOL = st.sampled_from(NAMES), st.sampled_from(POOLS)
VERSION = st.integers(-1, 3)
OPERATION = st.one_of(
    st.tuples(st.just("join"), NAME, POOL, VERSION),
    st.tuples(st.just("leave"), NAME),
    st.tuples(st.just("grant"), NAME, st.integers(0, 8)),
    st.tuples(st.just("loaded"), NAME, VERSION),
    st.tuples(st.just("submit"), POOL, st.integers(0, 3), st.integers(0, 3), VERSION),
    st.tuples(st.just("assign")),
)

BEGIN = [("join", name, "student", 0) for name in NAMES] + [("grant", name, 4) for name in NAMES]
"""Every worker is there, with equal credit, so that ties and late versions come up often."""


class Naive:
    """Workers and jobs in lists, looked through from end to end: the rules and nothing else."""

    def __init__(self) -> None:
        self.workers: dict[str, dict] = {}
        self.queue: list[tuple[tuple[int, int], dict]] = []
        self.held: list[tuple[str, dict]] = []
        self.count = 0

    def submit(self, job: dict) -> None:
        self.queue.append(((job["order"], self.count), job))
        self.count += 1

    def join(self, name: str, pool: str, version: int) -> None:
        self.leave(name)
        self.workers[name] = {"pool": pool, "version": version, "credit": 0}

    def leave(self, name: str) -> None:
        self.workers.pop(name, None)
        again = [job for holder, job in self.held if holder == name]
        self.held = [(holder, job) for holder, job in self.held if holder != name]
        for job in again:
            self.submit(job)

    def assign(self) -> list[tuple[str, str]]:
        given = []
        for pool in POOLS:
            while waiting := sorted(
                (entry for entry in self.queue if entry[1]["pool"] == pool), key=lambda e: e[0]
            ):
                job = waiting[0][1]
                fitting = [
                    (worker["credit"], name)
                    for name, worker in self.workers.items()
                    if worker["pool"] == pool
                    and worker["version"] >= job["min_version"]
                    and worker["credit"] >= job["cost"]
                ]
                if not fitting:
                    break
                name = max(fitting)[1]
                self.workers[name]["credit"] -= job["cost"]
                self.queue.remove(waiting[0])
                self.held.append((name, job))
                given.append((name, job["id"]))
        return given


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATION, max_size=80))
def test_jobs_go_where_a_scan_of_all_workers_sends_them(operations: list[tuple]) -> None:
    naive, dispatcher = Naive(), Dispatcher(lease_seconds=60.0)
    for number, (what, *values) in enumerate([*BEGIN, *operations, ("assign",)]):
        match what:
            case "join":
                name, pool, version = values
                naive.join(name, pool, version)
                dispatcher.join(name, pool, number, version)
            case "leave":
                naive.leave(values[0])
                dispatcher.leave(values[0])
            case "grant":
                name, count = values
                if name in naive.workers:
                    naive.workers[name]["credit"] += count
                dispatcher.grant(name, count)
            case "loaded":
                name, version = values
                if name in naive.workers:
                    naive.workers[name]["version"] = version
                dispatcher.loaded(name, version)
            case "submit":
                pool, order, cost, oldest = values
                job = {"id": f"j{number}", "pool": pool, "order": order, "cost": cost}
                naive.submit({**job, "min_version": oldest})
                message = GradeTask(task_id=job["id"], gold="", responses=[], grader="g")
                dispatcher.submit(
                    Job(**{**job, "order": (order,)}, min_version=oldest, message=message)
                )
            case "assign":
                given = [(one.worker, one.job.id) for one in dispatcher.assign(float(number))]
                assert given == naive.assign()


def test_entries_out_of_date_do_not_pile_up() -> None:
    free = FreeWorkers()
    for change in range(2_000):
        free.put(f"w-{change % 10}", version=change // 20, credit=change % 7)
    assert sum(map(len, free._heaps.values())) <= 2 * 10 + 64
