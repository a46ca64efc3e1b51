"""The runs of a comparison as numbers: accuracy at equal steps and at equal compute, fates, cost,
curves.

Statistics are over *finished* runs only, so that a method is not judged by a run that died halfway;
what did not finish is kept beside them and always shown. Between two evaluations accuracy is
interpolated linearly, because runs evaluate when their pipeline lets them, not at the very same
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from zppo.comparison.record import Pair, Record, run_folder, title
from zppo.comparison.runs import Progress, progress_of
from zppo.comparison.statistics import Interval, mean_interval, question_interval, ratio_interval
from zppo.records.flops import PART_NAMES, Sizes, flops
from zppo.records.metrics import KIND_TITLES, reformulated_kinds
from zppo.report.load import RunData, load_run
from zppo.report.plots import running_mean, smoothing_width


class RunResult(Struct, frozen=True, kw_only=True):
    """One run. `data` is None where there is no run directory to read.

    `flops_after` [steps + 1] is the compute spent after so many trained steps, and `parts` its sums
    by part; None where it is not known.
    """

    method: str
    seed: int
    progress: Progress
    failure: str | None
    data: RunData | None
    flops_after: np.ndarray | None = None
    parts: dict[str, float] | None = None

    @property
    def finished(self) -> bool:
        return self.progress.state == "finished" and self.data is not None

    @property
    def the_data(self) -> RunData:
        """The records of a run that has any."""
        assert self.data is not None, f"{self.method} seed {self.seed} has no records"
        return self.data

    def evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        """(trained steps, held-out accuracy), in rising order of steps; empty without
        evaluations."""
        points = {line["step"]: line["accuracy"] for line in self.the_data.heldout}
        steps = sorted(points)
        return np.array(steps, dtype=int), np.array([points[step] for step in steps], dtype=float)

    def accuracy_at(self, step: float) -> float | None:
        """Held-out accuracy after `step` steps; None where the run was not evaluated both before
        and after."""
        steps, values = self.evaluations()
        return (
            float(np.interp(step, steps, values))
            if len(steps) and steps[0] <= step <= steps[-1]
            else None
        )

    def accuracy_for(self, cost: float) -> float | None:
        """Held-out accuracy after `cost` FLOPs; None where it is not known."""
        spent, values = self.evaluated_flops()
        return (
            float(np.interp(cost, spent, values))
            if len(spent) and spent[0] <= cost <= spent[-1]
            else None
        )

    def evaluated_flops(self) -> tuple[np.ndarray, np.ndarray]:
        """(FLOPs, held-out accuracy) at each evaluation; empty where the compute is not known."""
        steps, values = self.evaluations()
        if self.flops_after is None:
            return np.zeros(0), np.zeros(0)
        known = steps < len(self.flops_after)
        return self.flops_after[steps[known]], values[known]

    def by_question(self) -> dict[str, float]:
        """Accuracy on each held-out question at the last evaluation; empty where it was not
        recorded."""
        lines = sorted(self.the_data.heldout, key=lambda line: line["step"])
        return dict(lines[-1].get("by_question") or {}) if lines else {}


class MethodResult(Struct, frozen=True, kw_only=True):
    """All runs of one method, in order of their seeds."""

    name: str
    title: str
    runs: list[RunResult]

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs if run.finished]

    def interval(self, of: Callable[[RunResult], float | None]) -> Interval | None:
        """Mean of a number over the finished runs that have it."""
        return mean_interval([value for run in self.finished if (value := of(run)) is not None])


class Results(Struct, frozen=True, kw_only=True):
    """The comparison. `step` and `cost` are the equal budgets: the largest that every finished run
    has reached and evaluated; None where there is none."""

    record: Record
    methods: list[MethodResult]
    step: int | None
    cost: float | None

    @property
    def runs(self) -> list[RunResult]:
        return [run for method in self.methods for run in method.runs]

    @property
    def baseline(self) -> MethodResult:
        return next(method for method in self.methods if method.name == self.record.baseline)

    def at_steps(self, run: RunResult) -> float | None:
        return run.accuracy_at(self.step) if self.step is not None else None

    def at_cost(self, run: RunResult) -> float | None:
        return run.accuracy_for(self.cost) if self.cost is not None else None

    @property
    def headline(self) -> Callable[[RunResult], float | None]:
        """The accuracy that the user wants to see first."""
        return (
            self.at_cost
            if self.record.budget == "compute" and self.cost is not None
            else self.at_steps
        )

    @property
    def headline_budget(self) -> str:
        """Where `headline` is taken."""
        return f"{self.step} steps" if self.headline == self.at_steps else "equal compute"

    def differences(
        self, method: MethodResult, of: Callable[[RunResult], float | None]
    ) -> list[float]:
        """Method − baseline for each shared seed, each seed with itself."""
        ours, theirs = _by_seed(method, of), _by_seed(self.baseline, of)
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def difference(
        self, method: MethodResult, of: Callable[[RunResult], float | None]
    ) -> Interval | None:
        """Their mean."""
        return mean_interval(self.differences(method, of))

    def question_difference(self, method: MethodResult) -> Interval | None:
        """The same at the last evaluation, paired question by question; None where answers were not
        recorded."""
        ours, theirs = _questions(method), _questions(self.baseline)
        seeds = sorted(ours.keys() & theirs.keys())
        shared = [set(ours[seed]) & set(theirs[seed]) for seed in seeds]
        questions = sorted(set.intersection(*shared)) if shared else []
        rows = [[ours[seed][name] - theirs[seed][name] for name in questions] for seed in seeds]
        return question_interval(np.array(rows, dtype=float).reshape(len(seeds), len(questions)))


def load_results(out: Path, record: Record) -> Results:
    """Read every run of the comparison. Raises UserError for a damaged run directory."""
    methods = [
        MethodResult(
            name=name,
            title=title(name),
            runs=[_load(out, record, Pair(name, seed)) for seed in record.seeds],
        )
        for name in record.methods
    ]
    finished = [run for method in methods for run in method.finished if len(run.evaluations()[0])]
    steps = [int(run.evaluations()[0][-1]) for run in finished]
    costs = [run.evaluated_flops()[0] for run in finished]
    known = bool(costs) and all(len(cost) for cost in costs)
    return Results(
        record=record,
        methods=methods,
        step=min(steps, default=None),
        cost=min(float(cost[-1]) for cost in costs) if known else None,
    )


def graduation(method: MethodResult, entry: float | None = None) -> Interval | None:
    """Share of admitted questions that graduated, all or those admitted at one accuracy (Fig.
    4)."""
    admitted, graduated = (
        fate_counts(method, "admitted", entry),
        fate_counts(method, "graduated", entry),
    )
    return ratio_interval(graduated, admitted)


def fate_counts(method: MethodResult, fate: str, entry: float | None = None) -> list[int]:
    """How many questions met a fate, for each finished run."""
    counts = [run.the_data.fate_counts(fate) for run in method.finished]
    return [count.total() if entry is None else count[entry] for count in counts]


def entries(methods: Sequence[MethodResult]) -> list[float]:
    """The accuracies at which any run admitted questions."""
    found = {
        entry
        for method in methods
        for run in method.finished
        for entry in run.the_data.fate_counts("admitted")
    }
    return sorted(found)


def curve(method: MethodResult, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [K], values [S, K]) of a metric in the finished runs that have it; long series as
    running means."""
    series = [run.the_data.series(name) for run in method.finished]
    return _interpolated([(one.steps, smooth(one.values)) for one in series if len(one.steps)])


def smooth(values_K: np.ndarray) -> np.ndarray:
    """A running mean where there are enough points for one, as in the report of a single run."""
    return (
        running_mean(values_K, smoothing_width(len(values_K))) if len(values_K) >= 16 else values_K
    )


def heldout_curve(method: MethodResult) -> tuple[np.ndarray, np.ndarray]:
    """(steps [K], accuracy [S, K]) at all evaluated steps that lie within every finished run."""
    runs = [run.evaluations() for run in method.finished if len(run.evaluations()[0])]
    return _interpolated(runs)


def cost_curve(method: MethodResult) -> tuple[np.ndarray, np.ndarray]:
    """(FLOPs [K], accuracy [S, K]), likewise over the compute spent."""
    runs = [run.evaluated_flops() for run in method.finished if len(run.evaluated_flops()[0])]
    return _interpolated(runs)


def kinds(results: Results) -> dict[str, str]:
    """Reformulated kinds that a finished run had groups of, with their titles."""
    lines = [line for run in results.runs if run.finished for line in run.the_data.steps]
    found = dict.fromkeys(
        kind for line in lines for kind in reformulated_kinds(line) if line[f"window/{kind}"]
    )
    return {kind: KIND_TITLES.get(kind, kind) for kind in sorted(found)}


def total_flops(run: RunResult) -> float | None:
    return sum(run.parts.values()) if run.parts is not None else None


def _interpolated(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not runs:
        return np.zeros(0), np.zeros((0, 0))
    low, high = max(at[0] for at, _ in runs), min(at[-1] for at, _ in runs)
    places = np.unique(np.concatenate([at for at, _ in runs]))
    places = places[(places >= low) & (places <= high)]
    return places, np.array([np.interp(places, at, values) for at, values in runs])


def _load(out: Path, record: Record, pair: Pair) -> RunResult:
    directory = run_folder(out, pair)
    progress = progress_of(directory)
    failure = record.failures.get(pair.name)
    if not (directory / "run.json").is_file():
        return RunResult(
            method=pair.method, seed=pair.seed, progress=progress, failure=failure, data=None
        )
    data = load_run(directory)
    spent = step_flops(data, record.sizes)
    return RunResult(
        method=pair.method,
        seed=pair.seed,
        progress=progress,
        failure=failure,
        data=data,
        flops_after=None
        if spent is None
        else np.concatenate([[0.0], np.cumsum(np.sum(list(spent.values()), axis=0))]),
        parts=None
        if spent is None
        else {part: float(values.sum()) for part, values in spent.items()},
    )


def step_flops(data: RunData, sizes: Sizes) -> dict[str, np.ndarray] | None:
    """FLOPs of each step by part; None if any step lacks its counts or the teacher's size is not
    known."""
    steps = [flops(line, sizes) for line in data.steps]
    known = [step for step in steps if step is not None]
    if not known or len(known) < len(steps):
        return None
    return {part: np.array([step[part] for step in known]) for part in PART_NAMES}


def _by_seed(method: MethodResult, of: Callable[[RunResult], float | None]) -> dict[int, float]:
    return {run.seed: value for run in method.finished if (value := of(run)) is not None}


def _questions(method: MethodResult) -> dict[int, dict[str, float]]:
    return {run.seed: answers for run in method.finished if (answers := run.by_question())}
