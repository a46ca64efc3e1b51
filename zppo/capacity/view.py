"""The times of a plan as a person reads them."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from zppo.capacity.answer import Expected, Replay, Times
from zppo.plan.machine import at_most


def show_times(times: Times, console: Console) -> None:
    """Print what the run would take as it is, with other bounds, and at its best."""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    line(f"expected, from {times.simulated_steps} simulated steps; speeds: {times.source}")
    if times.replay is not None:
        line(_replayed(times.replay))
    console.print(_expectations(times))
    console.print(_memory(times))
    line(_advice(times))
    if times.ended_early:
        line(
            f"note: the search ended after {times.simulations} simulations, before all was tried; "
            "--seconds gives it more time"
        )


def _replayed(replay: Replay) -> str:
    return (
        f"replay of its run: {replay.simulated:.3g} s a step, recorded {replay.recorded:.3g} "
        f"({replay.error:+.0%}, steps {replay.first_step} to {replay.last_step})"
    )


def _expectations(times: Times) -> Table:
    table = Table()
    for name in (
        "bound", "engines", "s/step", "hours", "bottleneck", "busy", "staleness",
    ):  # fmt: skip
        table.add_column(name, no_wrap=name == "bottleneck")  # one word, and no long ones
    best, known = times.best.expected, False
    for one in times.bounds:
        marks = " (this run)" if one.max_staleness == times.given.max_staleness else ""
        if (one.max_staleness, one.engines) == (best.max_staleness, best.engines):
            known, marks = True, f"{marks} (best found)"
        table.add_row(*_row(one, marks))
    if not known:
        table.add_row(*_row(best, " (best found)"))
    return table


def _row(one: Expected, mark: str) -> list[str]:
    return [
        f"{one.max_staleness}{mark}",
        " + ".join(f"{count} {pool}" for pool, count in one.engines.items()),
        f"{one.seconds_per_step:.3g}",
        f"{one.hours:.3g}",
        one.bottleneck,
        ", ".join(f"{pool} {share:.0%}" for pool, share in one.busy.items()),
        f"{one.staleness_mean:.2f}, at most {one.staleness_max}",
    ]


def _memory(times: Times) -> Table:
    given, best = times.given, times.best.expected
    plans = [given, best] if times.best.changes else [given]
    table = Table(title="memory", title_justify="left")
    for name in ("device", "this run", *(["best found"] if times.best.changes else [])):
        table.add_column(name)
    alike: dict[tuple[str, ...], list[str]] = {}
    for device in dict.fromkeys([*given.memory, *best.memory]):
        sizes = tuple(
            at_most(one.memory.get(device, 0), least=device in one.memory_least) for one in plans
        )
        alike.setdefault(sizes, []).append(device)
    for shown, devices in alike.items():
        others = f" and {len(devices) - 2} more" if len(devices) > 3 else ""
        table.add_row(", ".join(devices[:2] if others else devices) + others, *shown)
    return table


def _advice(times: Times) -> str:
    best = times.best
    if not best.changes:
        return "nothing faster was found for these processes and bounds"
    pairs = [change for change in best.changes if not change.startswith("more_teachers")]
    inside = [change for change in best.changes if change.startswith("more_teachers")]
    said = " ".join(f"--set {shlex.quote(pair)}" for pair in pairs)
    said += f" and, in the file, {', '.join(inside)}" if inside else ""
    faster = f"{best.gain:.2f} times the tokens of this run in the same time"
    if best.expected.max_staleness < times.given.max_staleness:
        faster += ", with less staleness"
    return f"best found, {faster}: {said}"
