"""Kinds of panels that a comparison draws: for each method a row, a line, or a small panel of its
own.

Up to `MOST_LINES` methods share a panel as lines; more get a panel each, with the others behind it
in grey, so that no reader has to tell thirteen colours apart. Means are strong, intervals over
seeds are bands or bars, single seeds faint.

Shape legend: S seeds, K places along the x axis.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zppo.comparison.results import MethodResult
from zppo.comparison.statistics import Interval, band
from zppo.report import plots
from zppo.report.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

MOST_LINES = 6
LINE_LOOKS = (
    (BLUE, "-"), (VERMILION, "-"), (GREEN, "-"), (ORANGE, "--"), (PURPLE, "--"), (BLACK, ":"),
)  # fmt: skip
BEHIND = "#C9CDD3"
DOTS_PER_INCH = 150

Curve = tuple[np.ndarray, np.ndarray]
"""(places [K], values [S, K])."""


class Picture(NamedTuple):
    """A finished figure. `name` is that of its file; `wide` asks for the whole width of the
    page."""

    name: str
    section: str
    title: str
    caption: str
    figure: Figure

    @property
    def wide(self) -> bool:
        return self.figure.get_figwidth() > 7


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No date and no version: the same runs give the same bytes.
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DOTS_PER_INCH)
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


# ---- a row for each method -----------------------------------------------------------------------


def rows_canvas(rows: int, panels: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their rows; wide when there are several."""
    width = 6.2 if panels == 1 else 12.4
    figure = Figure(figsize=(width, 1.25 + 0.36 * rows), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])


def name_rows(axes: Axes, methods: Sequence[MethodResult]) -> None:
    """Method names down the left side, the first on top."""
    axes.set_yticks(range(len(methods)), [method.title for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)


def dots(
    axes: Axes,
    seeds: Sequence[Sequence[float]],
    means: Sequence[Interval | None],
    text: Callable[[float], str],
) -> None:
    """One row each: the seeds as faint dots, their mean with its interval, and the mean in words
    above it."""
    for row, (values, mean) in enumerate(zip(seeds, means, strict=True)):
        axes.plot(values, [row + 0.18] * len(values), "o", color=GREY, markersize=3.5, alpha=0.7)
        if mean is None:
            continue
        bars = (
            None
            if mean.low is None or mean.high is None
            else [[mean.value - mean.low], [mean.high - mean.value]]
        )
        axes.errorbar(
            [mean.value],
            [row],
            xerr=bars,
            color=BLUE,
            marker="o",
            markersize=6,
            capsize=3,
            linewidth=1.8,
        )
        axes.annotate(
            text(mean.value), (mean.value, row), xytext=(0, 5), textcoords="offset points",
            ha="center", fontsize=8.5, color=BLUE,
        )  # fmt: skip
    axes.margins(x=0.12)


def stacked_rows(
    axes: Axes, layers: Sequence[Sequence[float]], colours: Sequence[str], names: Sequence[str]
) -> None:
    """Horizontal bars of several parts; `layers` are the parts, each with a value for every row."""
    start = np.zeros(len(layers[0]))
    for layer, colour, name in zip(layers, colours, names, strict=True):
        axes.barh(range(len(layer)), layer, left=start, color=colour, label=name, height=0.62)
        start = start + np.asarray(layer)
    axes.margins(x=0.1)


# ---- a line for each method ----------------------------------------------------------------------


def curves(
    methods: Sequence[MethodResult],
    of: Callable[[MethodResult], Curve],
    title: str,
    x: str,
    y: str,
    share: bool,
) -> Figure | None:
    """Means over seeds along an axis, with bands; one panel, or one for each method when they are
    many."""
    found = [(method, curve) for method in methods if len((curve := of(method))[0])]
    if not found:
        return None
    if len(found) > MOST_LINES:
        return _small_multiples(found, title, x, y, share)
    figure, [axes] = plots.canvas()
    for (method, curve), (colour, style) in zip(found, LINE_LOOKS, strict=False):
        _line(axes, curve, colour, style, method.title)
    plots.label(axes, title, x, y)
    _axis(axes, share)
    plots.legend_below(axes, 3)
    return figure


def _small_multiples(
    found: Sequence[tuple[MethodResult, Curve]], title: str, x: str, y: str, share: bool
) -> Figure:
    figure, panels = grid(len(found))
    for (method, curve), axes in zip(found, panels, strict=True):
        for other, (places, values) in found:
            if other is not method:
                axes.plot(places, values.mean(axis=0), color=BEHIND, linewidth=0.9, zorder=1)
        _line(axes, curve, BLUE, "-", None)
        axes.set_title(method.title)
        _axis(axes, share)
    name_axes(figure, panels, f"{title} (grey: the other methods)", x, y)
    return figure


def name_axes(figure: Figure, panels: Sequence[Axes], title: str, x: str, y: str) -> None:
    """A title over a grid, the x axis in words below each column, the y axis once."""
    for axes in panels[-columns_for(len(panels)) :]:
        axes.set_xlabel(x)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.supylabel(y, fontsize=10)


def columns_for(count: int) -> int:
    """As many columns as leave the last row fullest; four where it makes no difference."""
    return count if count <= 4 else min((4, 5, 3), key=lambda columns: -count % columns)


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """`count` small panels with the same axes; what is left of the last row stays empty."""
    columns = columns_for(count)
    rows = math.ceil(count / columns)
    width = 6.2 if count == 1 else 12.4
    figure = Figure(figsize=(width, 0.9 + 2.0 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, panels[:count]


def _line(axes: Axes, curve: Curve, colour: str, style: str, name: str | None) -> None:
    places, values = curve
    marker = "o" if len(places) < 16 else None
    axes.plot(
        places, values.mean(axis=0), color=colour, linestyle=style, linewidth=1.9, label=name,
        marker=marker, markersize=3.5,
    )  # fmt: skip
    limits = band(values)
    if limits is not None:
        axes.fill_between(places, *limits, color=colour, alpha=0.15, linewidth=0)


def _axis(axes: Axes, share: bool) -> None:
    if share:
        plots.percent_ticks(axes)
