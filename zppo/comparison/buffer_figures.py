"""The figures of a comparison that show the replay buffer and the batch: graduations, fates,
occupancy, composition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zppo.comparison.panels import (
    BEHIND,
    Picture,
    dots,
    grid,
    name_axes,
    name_rows,
    rows_canvas,
    stacked_rows,
)
from zppo.comparison.results import MethodResult, Results, entries, fate_counts, graduation, kinds
from zppo.report import plots
from zppo.report.figures import percent
from zppo.report.plots import BIN_COLOURS, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

SECTION = "Replay buffer"
STEP = "rollout step"
MOST_BINS = 4
"""Panels side by side: the accuracies of groups of 8 below τ = 0.5."""
KIND_COLOURS = {"bcq": GREEN, "ncq": VERMILION, "hint": PURPLE, "prefix": BLUE}
"""As in the report of a single run; kinds that are not here are grey."""


def graduated_share(results: Results) -> Picture | None:
    """Share of the admitted questions that graduated, by accuracy at admission (Fig. 4)."""
    methods = with_buffer(results)
    bins = entries(methods)[:MOST_BINS]
    if not bins:
        return None
    figure, panels = rows_canvas(len(methods), len(bins))
    for axes, entry in zip(panels, bins, strict=True):
        seeds = [_shares(method, entry) for method in methods]
        dots(
            axes,
            seeds,
            [graduation(method, entry) for method in methods],
            lambda value: f"{100 * value:.0f} %",
        )
        name_rows(axes, methods)
        axes.set_title(f"admitted at {percent(entry)}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.set_xlim(left=0)
    figure.supxlabel("graduated of those admitted", fontsize=10)
    caption = (
        "Blue: pooled over seeds, with a 95 % bootstrap interval over seeds. Grey: single seeds. "
        "Questions that "
        "came in late had less time. The shares that Fig. 4 names."
    )
    return Picture(
        "graduated_share", SECTION, "Graduates by accuracy at admission", caption, figure
    )


def graduations(results: Results) -> Picture | None:
    """Cumulative graduations by accuracy at admission (Fig. 4)."""
    methods = with_buffer(results)
    bins = entries(methods)
    if not bins:
        return None
    figure, panels = grid(len(methods))
    for method, axes in zip(methods, panels, strict=True):
        for entry, colour in zip(bins, BIN_COLOURS, strict=False):
            at = [run.the_data.fate_steps("graduated").get(entry) for run in method.finished]
            _banded(
                axes, np.array([_cumulative(one, results) for one in at]), colour, percent(entry)
            )
        axes.set_title(method.title)
        axes.set_ylim(bottom=0)
    _finish(figure, "Graduated questions, cumulative", "trained steps", "questions", panels)
    caption = (
        "By accuracy at admission; lines are means over seeds, bands the range of the seeds. As in "
        "Fig. 4."
    )
    return Picture("graduations", SECTION, "Graduations over steps", caption, figure)


def fates(results: Results) -> Picture | None:
    """What became of the admitted questions (Figs. 5b, 23)."""
    methods = with_buffer(results)
    if not entries(methods):
        return None
    figure, [axes] = rows_canvas(len(methods), 1)
    admitted, graduated, evicted = (
        np.array([np.mean(fate_counts(method, fate)) for method in methods])
        for fate in ("admitted", "graduated", "evicted")
    )
    left = np.maximum(admitted - graduated - evicted, 0)
    layers = {"graduated": graduated, "still inside": left, "evicted": evicted}
    stacked_rows(
        axes,
        [layer.tolist() for layer in layers.values()],
        (GREEN, BEHIND, VERMILION),
        list(layers),
    )
    for row, (count, whole) in enumerate(zip(graduated, admitted, strict=True)):
        axes.text(
            whole, row, f"  {count:.0f} of {whole:.0f}", va="center", fontsize=8.5, color="#40454D"
        )
    name_rows(axes, methods)
    axes.margins(x=0.22)
    axes.set_title("Fate of the admitted questions")
    axes.set_xlabel("questions, mean over seeds")
    plots.legend_below(axes, 3)
    caption = (
        "At the end of the run. The number beside a bar: graduated of admitted. As in Figs. 5b and "
        "23."
    )
    return Picture("fates", SECTION, "Graduation and eviction", caption, figure)


def occupancy(results: Results) -> Picture | None:
    """What is in the buffer, stacked by accuracy at admission (Fig. 20)."""
    methods = [method for method in with_buffer(results) if _occupancy(method)]
    if not methods:
        return None
    bins = sorted({entry for method in methods for entry in _occupancy(method)})
    figure, panels = grid(len(methods))
    for method, axes in zip(methods, panels, strict=True):
        layers = _occupancy(method)
        empty = np.zeros(len(next(iter(layers.values()))))
        stack = [layers.get(entry, empty) for entry in bins]
        plots.stack(
            axes,
            np.arange(len(empty)),
            stack,
            BIN_COLOURS[: len(bins)],
            [percent(entry) for entry in bins],
        )
        axes.set_title(method.title)
    _finish(figure, "Questions in the buffer", STEP, "questions, mean over seeds", panels)
    return Picture(
        "occupancy",
        SECTION,
        "Buffer occupancy",
        "Stacked by accuracy at admission, as in Fig. 20.",
        figure,
    )


def composition(results: Results) -> Picture | None:
    """Groups by what they are (Fig. 5a)."""
    methods = [
        method
        for method in results.methods
        if method.finished and method.finished[0].the_data.steps
    ]
    if not methods:
        return None
    shown = kinds(results)
    names = ["plain, easy", "plain, hard", *shown.values()]
    colours = [SKY, ORANGE, *(KIND_COLOURS.get(kind, GREY) for kind in shown)]
    figure, panels = grid(len(methods))
    for method, axes in zip(methods, panels, strict=True):
        layers = _composition(method, list(shown))
        plots.stack(axes, np.arange(len(layers[0])), layers, colours, names)
        axes.set_title(method.title)
    _finish(figure, "Groups of a step", STEP, "groups, mean over seeds", panels)
    caption = (
        "What the student sampled in a step, as in Fig. 5a. Hard: plain accuracy below the "
        "threshold τ."
    )
    return Picture("composition", "Dynamics", "Batch composition", caption, figure)


def with_buffer(results: Results) -> list[MethodResult]:
    """Methods whose finished runs admitted questions."""
    return [method for method in results.methods if any(fate_counts(method, "admitted"))]


def _shares(method: MethodResult, entry: float) -> list[float]:
    pairs = zip(
        fate_counts(method, "graduated", entry), fate_counts(method, "admitted", entry), strict=True
    )
    return [graduated / admitted for graduated, admitted in pairs if admitted]


def _cumulative(at: np.ndarray | None, results: Results) -> np.ndarray:
    """Events up to the end of each step, one entry more than there are steps."""
    last = max(
        int(run.the_data.step_numbers().max(initial=0)) for run in results.runs if run.finished
    )
    counts = np.bincount(at, minlength=last + 1) if at is not None else np.zeros(last + 1)
    return np.concatenate([[0], np.cumsum(counts)])


def _banded(axes: Axes, counts_SK: np.ndarray, colour: str, name: str) -> None:
    places = np.arange(counts_SK.shape[1])
    axes.plot(places, counts_SK.mean(axis=0), color=colour, label=name, linewidth=1.8)
    if len(counts_SK) > 1:
        low, high = counts_SK.min(axis=0), counts_SK.max(axis=0)
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _occupancy(method: MethodResult) -> dict[float, np.ndarray]:
    """Mean over seeds of the number inside, by entry accuracy, for the steps that all runs have."""
    families = [run.the_data.families("buffer/by_entry_accuracy") for run in method.finished]
    steps = min((len(run.the_data.steps) for run in method.finished), default=0)
    bins = sorted({entry for family in families for entry in family})
    empty = np.zeros(steps)
    return {
        entry: np.mean([family.get(entry, empty)[:steps] for family in families], axis=0)
        for entry in bins
    }


def _composition(method: MethodResult, shown: Sequence[str]) -> list[np.ndarray]:
    """Easy and hard plain groups and those of each kind, for the steps that all runs have, means
    over seeds."""
    steps = min(len(run.the_data.steps) for run in method.finished)

    def mean(name: str) -> np.ndarray:
        return np.asarray(
            np.mean(
                [run.the_data.column(f"window/{name}")[:steps] for run in method.finished], axis=0
            )
        )

    hard = mean("hard")
    return [mean("new") + mean("replayed") - hard, hard, *(mean(kind) for kind in shown)]


def _finish(figure: Figure, title: str, x: str, y: str, panels: Sequence[Axes]) -> None:
    """What all small panels share: a title, the axes in words, whole numbers, one legend."""
    for axes in panels:
        plots.whole_numbers(axes, y=True)
    name_axes(figure, panels, title, x, y)
    plots.legend_below(panels[0], len(panels[0].get_legend_handles_labels()[1]))
