"""What a scheduler is at, in plain words: for the live view and the watchdog's verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zppo.config.served import teachers
from zppo.scheduling.scheduler import Scheduler


def phase(scheduler: Scheduler) -> str:
    """One word for the live view."""
    if scheduler.stopping:
        return "stopping"
    if scheduler.finished:
        return "finished"
    if scheduler.evaluation is not None and not scheduler.windows:
        return "evaluating"
    return "training" if scheduler.windows or scheduler.trained else "starting"


def waiting(scheduler: Scheduler) -> list[str]:
    """Who waits for whom, one line each."""
    return [
        *_trainer(scheduler),
        *(
            f"window {index} waits for {_describe(scheduler, task_ids)}"
            for index, task_ids in sorted(scheduler.missing.items())
            if task_ids
        ),
        *_evaluation(scheduler),
        *_next_window(scheduler),
    ]


def out_of_budget(scheduler: Scheduler) -> str | None:
    """Why the run cannot train another step: a teacher is needed for it, or for the evaluation that
    is due, and the budget is spent. What needs no teacher any more is trained first."""
    problem = scheduler.budget.problem
    if problem is None or scheduler.training is not None:
        return None
    heads = [scheduler.dispatcher.head(one.pool) for one in teachers(scheduler.topology)]
    held = any(job is not None and job.order[0] <= scheduler.trained for job in heads)
    return problem if held else None


def teachers_at_work(scheduler: Scheduler) -> bool:
    """Whether a teacher holds a job."""
    pools = {one.pool for one in teachers(scheduler.topology)}
    dispatcher = scheduler.dispatcher
    return any(w.pool in pools and dispatcher.leases(w.name) for w in dispatcher.workers.values())


def _trainer(scheduler: Scheduler) -> list[str]:
    step = scheduler.trained
    if scheduler.training is not None:
        return [f"step {scheduler.training} is in the trainer"]
    if scheduler.trainer_idle_since is None:
        return ["the trainer has not asked for a window yet"]
    waits = scheduler.filling.waits(step, drains=scheduler.drains)
    return [f"the trainer waits for {waits}"] if waits is not None else []


def _evaluation(scheduler: Scheduler) -> list[str]:
    if scheduler.evaluation is None:
        return []
    groups = scheduler.evaluation.groups
    left = sum(not group.done for group in groups)
    return [f"the held-out evaluation waits for {left} of {len(groups)} groups"]


def _next_window(scheduler: Scheduler) -> list[str]:
    index = scheduler.next_index
    more = index < scheduler.total_steps and bool(scheduler.cursor.left)
    if scheduler.stopping or not more or scheduler.pacer.may_open(index, scheduler.horizon):
        return []
    return [f"window {index} waits for step {scheduler.trained} (staleness bound)"]


def _describe(scheduler: Scheduler, task_ids: Iterable[str]) -> str:
    """E.g. `3 plain (rollout-0), 1 teacher (queued)`."""
    counts: Counter[str] = Counter()
    holders: dict[str, set[str]] = {}
    for task_id in task_ids:
        name = scheduler.targets[task_id].name
        counts[name] += 1
        holders.setdefault(name, set()).add(scheduler.dispatcher.holder(task_id) or "queued")
    return ", ".join(
        f"{n} {name} ({', '.join(sorted(holders[name]))})" for name, n in sorted(counts.items())
    )
