"""The resolved plan as a person reads it: what runs where, how large the windows are, what
staleness is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zppo.errors import count_of
from zppo.plan.cluster_view import device_memory, host_memory, host_rows, processes_by_host
from zppo.plan.loss_checks import preset_values
from zppo.plan.machine import at_most, gib
from zppo.plan.plan import Plan
from zppo.plan.teacher_work import covered_steps


def show(plan: Plan, run_dir: Path, console: Console) -> None:
    """Print the plan."""
    console.print(_facts(plan, run_dir))
    console.print(processes_by_host(plan) if len(plan.hosts) > 1 else _processes(plan))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _facts(plan: Plan, run_dir: Path) -> Table:
    topology, windows = plan.topology, plan.windows
    scheduler, method = topology.scheduler, topology.method
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path whose end is cut off says nothing
    extra = f"up to {windows.replayed} replayed and {windows.reformulated} reformulated"
    versions = f"at most {count_of(scheduler.max_staleness, 'policy version')}"
    at_once = count_of(scheduler.max_staleness + 1, "window")
    new = count_of(windows.new, "new question")
    updates = count_of(plan.method.updates_per_step or method.updates_per_step, "update")
    every = topology.checkpoints.every
    checkpoints = count_of(plan.disk.checkpoints, "checkpoint")
    rows = [
        ("run", f"{topology.run.name}, seed {topology.run.seed}, in {run_dir}"),
        ("method", f"{plan.method.name}: {plan.method.summary}"),
        *([("preset", f"{method.preset}: {preset_values(method)}")] if method.preset else []),
        ("student", topology.student.model),
        ("teacher", topology.teacher.model if topology.teacher else "none"),
        *((("teacher's work", _work(plan)),) if plan.teacher_work else ()),
        ("steps", f"{windows.steps}, {updates} each"),
        ("window", f"{new}, {extra}; groups of {method.group_size}"),
        ("staleness", f"{versions}, so up to {at_once} at once"),
        (
            "checkpoints",
            f"every {'step' if every == 1 else f'{every} steps'}, {topology.checkpoints.keep} kept",
        ),
        (
            "disk",
            (
                f"{gib(plan.disk.total)} at most, {checkpoints} of {gib(plan.disk.checkpoint)} "
                "among it"
            ),
        ),
        *(host_rows(plan) if len(plan.hosts) > 1 else _memory(plan)),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    (host,) = plan.hosts
    size, shared = at_most(host.memory, least=host.memory_least), gib(host.shared)
    yield "memory", f"{size} on the host, {shared} of it published weights"


def _work(plan: Plan) -> str:
    """The most that teachers are asked for, and how far the budget reaches."""
    kinds = " · ".join(
        f"{work.kind} {count_of(work.requests, 'request')}, {count_of(work.tokens, 'token')}"
        for work in plan.teacher_work
    )
    covered = covered_steps(plan.topology, plan.teacher_work)
    if covered is None:
        return f"at most, in a step: {kinds}"
    steps = plan.windows.steps
    enough = f"the budget is enough for {min(covered, steps):,} of {count_of(steps, 'such step')}"
    return f"at most, in a step: {kinds}; {enough}"


def _processes(plan: Plan) -> Table:
    table = Table(title="processes", title_justify="left")
    for name in ("name", "device", "engine"):
        table.add_column(name)
    for name in ("threads", "host memory", "device memory"):
        table.add_column(name, justify="right")
    for entry, size in zip(plan.processes, plan.needs, strict=True):
        table.add_row(
            entry.name,
            entry.device or "-",
            entry.served.actor.engine if entry.served is not None else "-",
            str(entry.threads),
            host_memory(size),
            device_memory(size),
        )
    return table
