"""The tables of a comparison: as text for people (page and Markdown), and as plain rows for the CSV
files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zppo.comparison.results import (
    MethodResult,
    Results,
    RunResult,
    entries,
    fate_counts,
    graduation,
    total_flops,
)
from zppo.comparison.statistics import Interval, student_half_width
from zppo.records.flops import PART_NAMES
from zppo.records.metrics import entry_name
from zppo.report.figures import percent

ABSENT = "–"
COUNTED = (
    "tokens/generated", "compute/student_read", "compute/student_written",
    "compute/teacher_draws_read", "compute/teacher_draws_written", "compute/teacher_other_read",
    "compute/teacher_other_written", "compute/teacher_scored", "compute/proximal",
    "compute/trained", "train/tokens_trained",
)  # fmt: skip

Row = dict[str, Any]


class Table(NamedTuple):
    """`rows` hold the cells as text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


# ---- for people ----------------------------------------------------------------------------------


def tables(results: Results) -> list[Table]:
    """All tables that have something to say, in the order of the page."""
    return [
        table
        for table in (accuracies(results), graduates(results), costs(results), unfinished(results))
        if table
    ]


def accuracies(results: Results) -> Table | None:
    if results.step is None:
        return None
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": lambda method: method.title,
        "seeds": lambda method: f"{len(method.finished)} of {len(method.runs)}",
        "before": lambda method: _share(method.interval(lambda run: run.accuracy_at(0))),
        f"after {results.step} steps": lambda method: _share(method.interval(results.at_steps)),
        f"difference to {results.baseline.title}": lambda method: _points(
            results, method, results.at_steps
        ),
    }
    if results.cost is not None:
        columns[f"after {scientific(results.cost)} FLOPs"] = lambda method: _share(
            method.interval(results.at_cost)
        )
        columns["difference"] = lambda method: _points(results, method, results.at_cost)
    if any(results.question_difference(method) for method in results.methods):
        columns["difference, paired by question"] = lambda method: (
            ABSENT if method is results.baseline else _signed(results.question_difference(method))
        )
    return _table("Held-out accuracy", columns, results.methods)


def graduates(results: Results) -> Table | None:
    methods = [method for method in results.methods if any(fate_counts(method, "admitted"))]
    if not methods:
        return None
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": lambda method: method.title,
        "admitted": lambda method: _mean(fate_counts(method, "admitted")),
        "graduated": lambda method: _mean(fate_counts(method, "graduated")),
        "evicted": lambda method: _mean(fate_counts(method, "evicted")),
        "share graduated": lambda method: _share(graduation(method)),
    }
    for entry in entries(methods):
        columns[f"of those at {percent(entry)}"] = _graduation_cell(entry)
    return _table("Graduations from the replay buffer", columns, methods)


def costs(results: Results) -> Table | None:
    methods = [method for method in results.methods if method.finished]
    if not methods:
        return None
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": lambda method: method.title,
        "student writes": lambda method: _total(method, "compute/student_written"),
        "teacher answers": lambda method: _total(method, "compute/teacher_draws_written"),
        "teacher prepares and judges": lambda method: _total(
            method, "compute/teacher_other_written"
        ),
        "tokens in the loss": lambda method: _total(method, "train/tokens_trained"),
        "FLOPs": lambda method: _flops([total_flops(run) for run in method.finished]),
        "minutes": lambda method: _mean(
            [run.the_data.summary["wall_seconds"] / 60 for run in method.finished], 1
        ),
    }
    return _table("Cost of a run, means over seeds", columns, methods)


def unfinished(results: Results) -> Table | None:
    """Runs that are not part of the statistics, and why."""
    rows = [
        [run.title, str(seed), state, str(steps), why]
        for run, seed, state, steps, why in (
            (method, run.seed, _state(run), run.progress.steps, run.failure or ABSENT)
            for method in results.methods
            for run in method.runs
            if not run.finished
        )
    ]
    return (
        Table("Runs that did not finish", ["method", "seed", "state", "steps", "why"], rows)
        if rows
        else None
    )


# ---- for machines --------------------------------------------------------------------------------


def run_rows(results: Results) -> list[Row]:
    """`runs.csv`: one row a run, finished or not."""
    return [_run_row(results, run) for run in results.runs]


def method_rows(results: Results) -> list[Row]:
    """`methods.csv`: one row a method, intervals as `_low` and `_high`."""
    rows = []
    for method in results.methods:
        intervals = {
            "accuracy_equal_steps": method.interval(results.at_steps),
            "accuracy_equal_compute": method.interval(results.at_cost),
            "difference_equal_steps": results.difference(method, results.at_steps),
            "difference_equal_compute": results.difference(method, results.at_cost),
            "difference_by_question": results.question_difference(method),
            "graduation_share": graduation(method),
            "flops": method.interval(total_flops),
            "wall_seconds": method.interval(lambda run: run.the_data.summary["wall_seconds"]),
        }
        row: Row = {"method": method.name, "title": method.title, "finished": len(method.finished)}
        row["runs"] = len(method.runs)
        row["difference_student_half_width"] = student_half_width(
            results.differences(method, results.headline)
        )
        for name, interval in intervals.items():
            row |= _limits(name, interval)
        rows.append(row)
    return rows


def graduation_rows(results: Results) -> list[Row]:
    """`graduations.csv`: one row for each method and accuracy at admission, counts summed over
    seeds."""
    return [
        {
            "method": method.name,
            "entry_accuracy": entry_name(entry),
            "admitted": sum(fate_counts(method, "admitted", entry)),
            "graduated": sum(fate_counts(method, "graduated", entry)),
            "evicted": sum(fate_counts(method, "evicted", entry)),
            **_limits("share", graduation(method, entry)),
        }
        for method in results.methods
        for entry in entries([method])
    ]


def evaluation_rows(results: Results) -> list[Row]:
    """`evaluations.csv`: one row an evaluation, of every run that has any."""
    rows: list[Row] = []
    for run in results.runs:
        if run.data is None:
            continue
        for step, accuracy in zip(*run.evaluations(), strict=True):
            spent = (
                run.flops_after[step]
                if run.flops_after is not None and step < len(run.flops_after)
                else None
            )
            rows.append(
                {
                    "method": run.method,
                    "seed": run.seed,
                    "step": int(step),
                    "flops": spent,
                    "accuracy": float(accuracy),
                }
            )
    return rows


def _run_row(results: Results, run: RunResult) -> Row:
    row: Row = {
        "method": run.method,
        "seed": run.seed,
        "state": _state(run),
        "failure": run.failure,
        "steps": run.progress.steps,
    }
    if run.data is None:
        return row
    summary = run.data.summary
    keys = ("heldout_before", "heldout_after", "admitted", "graduated", "evicted", "wall_seconds")
    row |= {key: summary[key] for key in keys}
    row |= {
        "accuracy_equal_steps": results.at_steps(run),
        "accuracy_equal_compute": results.at_cost(run),
    }
    row |= {
        f"tokens_{name.partition('/')[2]}": int(run.data.column(name).sum()) for name in COUNTED
    }
    row["flops"] = total_flops(run)
    return row | {f"flops_{part}": (run.parts or {}).get(part) for part in PART_NAMES}


# ---- cells ---------------------------------------------------------------------------------------


def share_text(interval: Interval) -> str:
    """`85.3 % [83.1, 87.2]`; of one seed, without the brackets."""
    return f"{100 * interval.value:.1f} %{_brackets(interval, '.1f')}"


def points_text(interval: Interval) -> str:
    """`+7.0 [5.1, 8.8]` percentage points."""
    return f"{100 * interval.value:+.1f}{_brackets(interval, '+.1f')}"


def scientific(value: float) -> str:
    """`1.2e12` as people write it: 1.20 × 10¹²."""
    digits, exponent = f"{value:.2e}".split("e")
    return (
        f"{digits} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"
    )


def _brackets(interval: Interval, digits: str) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" [{100 * interval.low:{digits}}, {100 * interval.high:{digits}}]"


def _table(
    title: str, columns: dict[str, Callable[[MethodResult], str]], methods: Sequence[MethodResult]
) -> Table:
    return Table(
        title, list(columns), [[cell(method) for cell in columns.values()] for method in methods]
    )


def _graduation_cell(entry: float) -> Callable[[MethodResult], str]:
    return lambda method: _share(graduation(method, entry))


def _share(interval: Interval | None) -> str:
    return ABSENT if interval is None else share_text(interval)


def _signed(interval: Interval | None) -> str:
    return ABSENT if interval is None else points_text(interval)


def _points(results: Results, method: MethodResult, of: Callable[[RunResult], float | None]) -> str:
    return ABSENT if method is results.baseline else _signed(results.difference(method, of))


def _mean(values: Sequence[float], digits: int = 0) -> str:
    return f"{sum(values) / len(values):,.{digits}f}" if values else ABSENT


def _total(method: MethodResult, metric: str) -> str:
    runs = [run.the_data for run in method.finished]
    known = all(len(run.series(metric).steps) == len(run.steps) for run in runs)
    return _mean([float(run.column(metric).sum()) for run in runs]) if known else ABSENT


def _flops(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return scientific(sum(known) / len(known)) if known and len(known) == len(values) else ABSENT


def _state(run: RunResult) -> str:
    if run.finished:
        return "finished"
    return (
        "failed"
        if run.failure is not None
        else {"absent": "not begun"}.get(run.progress.state, "not finished")
    )


def _limits(name: str, interval: Interval | None) -> Row:
    parts = (
        (interval.value, interval.low, interval.high)
        if interval is not None
        else (None, None, None)
    )
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))
