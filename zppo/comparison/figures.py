"""The figures of a comparison: how well the methods learn, and at what price.

Each is a function from the results to a picture, or None when no run has the data for it; captions
name the figure of the paper that shows the same quantity. Those of the replay buffer are in
`zppo.comparison.buffer_figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.ticker import EngFormatter

from zppo.comparison import buffer_figures
from zppo.comparison.panels import (
    Curve,
    Picture,
    curves,
    dots,
    name_rows,
    rows_canvas,
    stacked_rows,
)
from zppo.comparison.results import (
    MethodResult,
    Results,
    RunResult,
    cost_curve,
    curve,
    heldout_curve,
    kinds,
)
from zppo.comparison.statistics import Interval, mean_interval
from zppo.records.flops import PART_NAMES
from zppo.report import plots
from zppo.report.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

STEP = "rollout step"
INTERVAL = "Bars and bands: 95 % bootstrap interval over seeds"
PART_COLOURS = (BLUE, ORANGE, VERMILION, PURPLE, SKY, GREEN)

Drawn = Picture | None


def accuracy(results: Results) -> Drawn:
    """Held-out accuracy at equal steps and at equal compute (Fig. 1)."""
    budgets: list[tuple[str, Callable[[RunResult], float | None]]] = []
    if results.step is not None:
        budgets.append((f"after {results.step} steps", results.at_steps))
    if results.cost is not None:
        budgets.append((f"after {results.cost:.3g} FLOPs", results.at_cost))
    if not budgets:
        return None
    figure, panels = rows_canvas(len(results.methods), len(budgets))
    for axes, (budget, of) in zip(panels, budgets, strict=True):
        seeds = [_values(method, of) for method in results.methods]
        dots(axes, seeds, [method.interval(of) for method in results.methods], _percent)
        name_rows(axes, results.methods)
        axes.set_title(f"Held-out accuracy {budget}")
        axes.set_xlabel("share correct")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    caption = f"Blue: mean over seeds. Grey: single seeds. {INTERVAL}. The comparison of Fig. 1."
    return Picture("accuracy", "Accuracy", "Held-out accuracy by method", caption, figure)


def differences(results: Results) -> Drawn:
    """Paired differences to the baseline."""
    others = [method for method in results.methods if method.name != results.baseline.name]
    by_seed = [results.difference(method, results.headline) for method in others]
    if not any(by_seed):
        return None
    by_question = [results.question_difference(method) for method in others]
    panels_of: list[tuple[str, Sequence[Interval | None]]] = [
        (f"by seed, {results.headline_budget}", by_seed)
    ]
    if any(by_question):
        panels_of.append(("by seed and question, at the end", by_question))
    figure, panels = rows_canvas(len(others), len(panels_of))
    for axes, (kind, intervals) in zip(panels, panels_of, strict=True):
        axes.axvline(0, color=BLACK, linewidth=1)
        dots(axes, [[] for _ in others], intervals, lambda value: f"{100 * value:+.1f}")
        name_rows(axes, others)
        axes.set_title(f"Difference to {results.baseline.title}, {kind}")
        axes.set_xlabel("percentage points")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}" if value else "0")
    caption = (
        "Each seed is compared with itself, because runs of one seed see the data in the same "
        "order. Bars: 95 % "
        "bootstrap interval over seeds; on the right over seeds and held-out questions together."
    )
    return Picture(
        "differences",
        "Accuracy",
        f"Paired differences to {results.baseline.title}",
        caption,
        figure,
    )


def over_steps(results: Results) -> Drawn:
    return _curves(
        results,
        "accuracy_steps",
        "Held-out accuracy over steps",
        heldout_curve,
        "trained steps",
    )


def over_compute(results: Results) -> Drawn:
    picture = _curves(
        results, "accuracy_flops", "Held-out accuracy over compute", cost_curve, "FLOPs spent"
    )
    for axes in picture.figure.axes if picture is not None else ():
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return picture


def rollout_accuracy(results: Results) -> Drawn:
    return _metric(
        results,
        "accuracy/new",
        "rollout_accuracy",
        "Rollout accuracy on new questions (Fig. 22)",
        True,
    )


def positive(results: Results) -> Drawn:
    name, title = "train/positive_advantage_share", "Rollouts with positive advantage (Fig. 22)"
    return _metric(results, name, "positive_advantage", title, True, y="share")


def entropy(results: Results) -> Drawn:
    return _metric(
        results, "train/entropy", "entropy", "Policy entropy (Fig. 22)", False, y="nats per token"
    )


def loss(results: Results) -> Drawn:
    return _metric(
        results, "train/loss", "loss", "Loss (Fig. 25)", False, y="mean over the updates of a step"
    )


def reformulated(results: Results) -> list[Drawn]:
    """Accuracy on every kind of reformulated prompt (Fig. 25)."""
    return [
        _metric(
            results,
            f"accuracy/{kind}",
            f"accuracy_{kind}",
            f"Accuracy on {title} prompts (Fig. 25)",
            True,
        )
        for kind, title in kinds(results).items()
    ]


def compute(results: Results) -> Drawn:
    """FLOPs by part, and wall-clock time (D.3)."""
    parts = {part: [_mean_part(method, part) for method in results.methods] for part in PART_NAMES}
    shown = {part: values for part, values in parts.items() if any(values)}
    figure, [cost, time] = rows_canvas(len(results.methods), 2)
    if shown:
        colours = [
            colour for part, colour in zip(PART_NAMES, PART_COLOURS, strict=True) if part in shown
        ]
        stacked_rows(cost, list(shown.values()), colours, [PART_NAMES[part] for part in shown])
        plots.legend_below(cost, 6)
    name_rows(cost, results.methods)
    cost.set_title("Compute of a run")
    cost.set_xlabel("FLOPs")
    cost.xaxis.set_major_formatter(EngFormatter(sep=" "))
    seeds = [_values(method, _minutes) for method in results.methods]
    dots(
        time,
        seeds,
        [method.interval(_minutes) for method in results.methods],
        lambda value: f"{value:.3g}",
    )
    name_rows(time, results.methods)
    time.set_title("Time in training")
    time.set_xlabel("minutes")
    time.set_xlim(left=0)
    caption = (
        "FLOPs: 2N for each token read or written, 6N for each token of an update, N the "
        "parameters of the model at "
        "work; means over seeds. Time depends on the machine and on what else ran there."
    )
    if not shown:
        caption += " The runs have no counts of tokens, or the size of the teacher is not known."
    return Picture("compute", "Cost", "Compute and time", caption, figure)


def tokens(results: Results) -> Drawn:
    """Tokens written and trained, by whom (D.3)."""
    columns = {
        "student writes": ("compute/student_written", BLUE),
        "teacher answers": ("compute/teacher_draws_written", ORANGE),
        "teacher prepares and judges": ("compute/teacher_other_written", VERMILION),
    }
    if not any(
        "compute/trained" in line
        for run in results.runs
        if run.finished
        for line in run.the_data.steps[:1]
    ):
        return None
    figure, [written, trained] = rows_canvas(len(results.methods), 2)
    layers = {
        name: [_mean_total(m, metric) for m in results.methods]
        for name, (metric, _) in columns.items()
    }
    stacked_rows(
        written, list(layers.values()), [colour for _, colour in columns.values()], list(layers)
    )
    stacked_rows(
        trained,
        [[_mean_total(m, "train/tokens_trained") for m in results.methods]],
        [GREY],
        ["response tokens in the loss"],
    )
    for axes, title in ((written, "Tokens written"), (trained, "Response tokens in the loss")):
        name_rows(axes, results.methods)
        axes.set_title(title)
        axes.set_xlabel("tokens of a run")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    plots.legend_below(written, 3)
    return Picture(
        "tokens",
        "Cost",
        "Tokens",
        "Means over seeds; prompts are counted in the FLOPs only.",
        figure,
    )


SECTIONS: Sequence[Callable[[Results], Drawn | list[Drawn]]] = (
    accuracy, differences, over_steps, over_compute, buffer_figures.graduated_share,
    buffer_figures.graduations, buffer_figures.fates, buffer_figures.occupancy, rollout_accuracy,
    buffer_figures.composition, reformulated, positive, entropy, loss, compute, tokens,
)  # fmt: skip
"""All figures in the order of the page."""


def draw_all(results: Results) -> list[Picture]:
    """All figures that the runs have data for. None before a run is finished."""
    if not any(run.finished for run in results.runs):
        return []
    pictures: list[Picture] = []
    with plots.look():
        for function in SECTIONS:
            drawn = function(results)
            pictures += [
                picture
                for picture in (drawn if isinstance(drawn, list) else [drawn])
                if picture is not None
            ]
    return pictures


def _curves(
    results: Results,
    name: str,
    title: str,
    of: Callable[[MethodResult], Curve],
    x: str,
) -> Drawn:
    figure = curves(results.methods, of, title, x, "share correct", share=True)
    return (
        None
        if figure is None
        else Picture(name, "Accuracy", title, f"Mean over seeds. {INTERVAL}.", figure)
    )


def _metric(
    results: Results, metric: str, name: str, title: str, share: bool, y: str = "share correct"
) -> Drawn:
    figure = curves(
        results.methods,
        lambda method: curve(method, metric),
        title.partition(" (")[0],
        STEP,
        y,
        share,
    )
    caption = f"Mean over seeds, smoothed over steps where there are many. {INTERVAL}."
    return None if figure is None else Picture(name, "Dynamics", title, caption, figure)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _values(method: MethodResult, of: Callable[[RunResult], float | None]) -> list[float]:
    return [value for run in method.finished if (value := of(run)) is not None]


def _minutes(run: RunResult) -> float | None:
    """Minutes in training."""
    return float(run.the_data.summary["wall_seconds"]) / 60


def _mean_part(method: MethodResult, part: str) -> float:
    values = [run.parts[part] for run in method.finished if run.parts is not None]
    return sum(values) / len(values) if values else 0.0


def _mean_total(method: MethodResult, metric: str) -> float:
    mean = mean_interval([float(run.the_data.column(metric).sum()) for run in method.finished])
    return mean.value if mean is not None else 0.0
