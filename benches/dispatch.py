"""Processor time of a job in the dispatcher: queued, handed out, answered, its credit granted anew.

    python benches/dispatch.py 28 1024

Each number is a count of engines. To compare two trees, run it in turns with PYTHONPATH on either.
"""

from __future__ import annotations

import sys
import time

from zppo.config.options import positive
from zppo.errors import Parser, run_command
from zppo.scheduling.dispatch import Dispatcher, Job
from zppo_protocol.messages import GradeTask

SLOTS, COST, JOBS_PER_ENGINE = 64, 8, 8


def microseconds_per_job(engines: int) -> float:
    dispatcher = Dispatcher(lease_seconds=60.0)
    for engine in range(engines):
        dispatcher.join(f"rollout-{engine}", "student", incarnation=1, version=0)
        dispatcher.grant(f"rollout-{engine}", SLOTS)
    message = GradeTask(task_id="t", gold="", responses=[], grader="math")
    count = JOBS_PER_ENGINE * engines
    jobs = [
        Job(id=str(k), pool="student", order=(k,), cost=COST, message=message, min_version=0)
        for k in range(count)
    ]
    start = time.process_time()
    for job in jobs:
        dispatcher.submit(job)
    for given in dispatcher.assign(0.0):
        dispatcher.accept(given.job.id, given.worker, 1)
        dispatcher.grant(given.worker, COST)
        dispatcher.assign(1.0)
    return (time.process_time() - start) / count * 1e6


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="+", type=positive)
    for engines in parser.parse_args().engines:
        print(f"{engines:5d} engines: {microseconds_per_job(engines):6.1f} µs a job")


if __name__ == "__main__":
    sys.exit(run_command(main))
