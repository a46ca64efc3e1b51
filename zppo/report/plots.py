"""The hand that draws: one look for all figures, and their way into the page.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. A figure becomes an SVG data
URI for an `<img>`: no script can run in it, no id of one figure meets an id of another, and it
prints sharp.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#8A8F98"
BIN_COLOURS = (VERMILION, ORANGE, SKY, BLUE, GREEN, PURPLE, YELLOW, BLACK)

_LOOK = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA0A8",
    "axes.labelcolor": "#40454D",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#40454D",
    "ytick.color": "#40454D",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "zppo",
}


def look() -> AbstractContextManager[None]:
    """Draw within this context: matplotlib reads its settings whenever a part of a figure is
    made."""
    return matplotlib.rc_context(_LOOK)  # type: ignore[arg-type]


def canvas(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with one row of panels: a single one fills half the page, several its whole
    width."""
    figure = Figure(figsize=(6.2 if panels == 1 else 12.4, 3.1), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def to_uri(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,…`."""
    buffer = io.BytesIO()
    # No date and no creator: the same run gives the same bytes.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def whole_numbers(axes: Axes, x: bool = True, y: bool = False) -> None:
    """Ticks at whole numbers only, for counts and steps."""
    if x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.set_ylim(bottom=0)


def shares(axes: Axes, top: float | None = None) -> None:
    """The y axis in per cent, from 0."""
    percent_ticks(axes)
    axes.set_ylim(0, top)


def percent_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, name: str | None = None
) -> None:
    """A noisy series: its points faintly and a running mean on top; a short one as it is, with
    markers."""
    if len(values) < 2 * smoothing_width(len(values)) or len(values) < 16:
        axes.plot(
            steps, values, color=colour, label=name, marker="o", markersize=3.5, linewidth=1.6
        )
        return
    axes.plot(steps, values, color=colour, alpha=0.28, linewidth=1)
    axes.plot(
        steps,
        running_mean(values, smoothing_width(len(values))),
        color=colour,
        label=name,
        linewidth=2,
    )


def smoothing_width(length: int) -> int:
    """A fifteenth of the run, odd, three at least."""
    return max(3, length // 15) | 1


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` (odd) neighbours, over fewer at the ends."""
    sums = np.convolve(values, np.ones(width), mode="same")
    return sums / np.convolve(np.ones(len(values)), np.ones(width), mode="same")


def staircase(
    axes: Axes, at: np.ndarray, last: int, colour: str, name: str, style: str = "-"
) -> None:
    """Cumulative count of events at the steps `at`, drawn up to the end of step `last`."""
    steps = np.arange(last + 2)
    counts = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=last + 1)[: last + 1])])
    axes.step(steps, counts, where="post", color=colour, label=name, linewidth=2, linestyle=style)


def stack(
    axes: Axes,
    steps: np.ndarray,
    layers: Sequence[np.ndarray],
    colours: Sequence[str],
    names: Sequence[str],
) -> None:
    """Stacked layers, one level a step, without gaps; each layer is a single shape however long the
    run is."""
    edges = np.append(steps - 0.5, steps[-1:] + 0.5)
    levels = [np.append(layer, layer[-1:]) for layer in layers]
    axes.stackplot(
        edges, levels, colors=list(colours), labels=list(names), step="post", linewidth=0
    )
    axes.margins(x=0)


def stacked_bars(
    axes: Axes,
    places: np.ndarray,
    layers: Sequence[np.ndarray],
    colours: Sequence[str],
    names: Sequence[str],
) -> None:
    """Stacked bars with gaps, for few places."""
    below = np.zeros(len(places))
    for layer, colour, name in zip(layers, colours, names, strict=True):
        axes.bar(places, layer, bottom=below, color=colour, label=name)
        below = below + layer


def legend(
    axes: Axes, loc: Literal["best", "upper left"] = "best", title: str | None = None
) -> None:
    axes.legend(loc=loc, title=title, handlelength=1.4)


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the panel, where it hides no data."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=1.4)
