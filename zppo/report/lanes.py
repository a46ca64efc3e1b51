"""Who worked and who waited: one lane a process, over the run and over its last steps.

A lane is an image of `COLUMNS` moments, so a page stays small however long the run was. The height
of a colour is the share of that moment in which the process did this; for an engine, the share of
its room for sequences that was taken. Pale is waiting, white is a process that was not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from zppo.records.timeline import (
    JOBS,
    MICRO,
    START,
    TRAIN,
    WAIT,
    Span,
    Timeline,
    Track,
    between,
)
from zppo.records.work import TRAINER
from zppo.report import plots

COLUMNS, ROWS = 900, 14
"""pixels of a lane: moments, and parts of its height"""
LAST_STEPS = 4
MOST_OF_POOL = 6
"""lanes of one pool; the others of it look alike"""
PALE = "#E3E7EC"
COLOURS = {
    START: plots.GREY, TRAIN: plots.BLUE, "publish": plots.VERMILION, "load": plots.VERMILION,
    "save": plots.BLACK, "sample": plots.SKY, "evaluate": plots.PURPLE, "draw": plots.GREEN,
    "compress": plots.YELLOW, "hint": plots.YELLOW, "judge": "#7B5CA8", "score": "#7B5CA8",
    "grade": plots.ORANGE, WAIT: PALE,
}  # fmt: skip
"""in the order in which they are stacked"""


def draw_lanes(timeline: Timeline) -> Figure:
    """Two panels, the run and its last steps."""
    tracks = _shown(timeline.tracks)
    height = 1.3 + 0.27 * len(tracks)
    figure = Figure(figsize=(12.4, height), layout="constrained")
    whole, end = figure.subplots(1, 2)
    _panel(whole, timeline, tracks, "The whole run")
    recent = _recent(timeline)
    _panel(end, recent, _shown(recent.tracks), f"The last {LAST_STEPS} steps")
    kinds = {span.kind for track in tracks for span in track.spans}
    names: dict[str, list[str]] = {COLOURS[kind]: [] for kind in COLOURS if kind in kinds}
    for kind, colour in COLOURS.items():
        if kind in kinds:
            names[colour].append(kind)
    patches = [Patch(color=colour, label=", ".join(known)) for colour, known in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), handlelength=1)
    return figure


def _shown(tracks: list[Track]) -> list[Track]:
    seen: Counter[str] = Counter()
    out = []
    for track in tracks:
        seen[track.pool] += 1
        if seen[track.pool] <= MOST_OF_POOL:
            out.append(track)
    return out


def _recent(timeline: Timeline) -> Timeline:
    """From the end of the step before the last few, or the trainer's first sign once it is loaded,
    to the end of the last one."""
    trainers = [track.spans for track in timeline.tracks if track.pool == TRAINER]
    spans = [span for spans in trainers for span in spans if span.kind != START]
    ends = sorted(span.end for span in spans if span.kind == TRAIN)
    if not ends:
        return timeline
    first = min(span.begin for span in spans)
    return between(timeline, max([first, *ends[:-LAST_STEPS][-1:]]), ends[-1])


def _panel(axes: Axes, timeline: Timeline, tracks: list[Track], title: str) -> None:
    lanes = [_lane(track, timeline.begin, timeline.end) for track in tracks]
    gap = np.ones((3, COLUMNS, 3))
    image = np.concatenate([part for lane in lanes for part in (lane, gap)])
    begin, end = timeline.begin / MICRO, timeline.end / MICRO
    axes.imshow(
        image, aspect="auto", interpolation="none", extent=(begin, end, len(tracks), 0), zorder=2
    )
    axes.set_yticks([number + 0.42 for number in range(len(tracks))], [t.actor for t in tracks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    plots.label(axes, title, "seconds since the run began", "")


def _lane(track: Track, begin: int, end: int) -> np.ndarray:
    """Colours [ROWS, COLUMNS, 3] in 0..1."""
    image = np.ones((ROWS, COLUMNS, 3))
    levels = _levels(track, begin, end)
    filled = np.zeros(COLUMNS)
    from_below = np.arange(ROWS)[::-1, None]
    for kind, colour in COLOURS.items():
        if kind not in levels:
            continue
        level = np.clip(levels[kind], 0.0, 1.0)
        # Waiting fills what is left; the least of any work is one pixel.
        tall = ROWS * (level > 0) if kind == WAIT else np.ceil(ROWS * level - 1e-6)
        top = np.minimum(ROWS, filled + tall)
        image[(from_below >= filled) & (from_below < top)] = to_rgb(colour)
        filled = top
    return image


def _levels(track: Track, begin: int, end: int) -> Mapping[str, np.ndarray]:
    """How much of each moment [COLUMNS] went to each kind."""
    width = max(1.0, (end - begin) / COLUMNS)
    levels: dict[str, np.ndarray] = {}
    for span in track.spans:
        if span.kind in COLOURS:
            level = levels.setdefault(span.kind, np.zeros(COLUMNS))
            low = max(0.0, (span.begin - begin) / width)
            high = min(float(COLUMNS), max((span.end - begin) / width, low + 1e-3))
            first, last = int(low), min(COLUMNS - 1, int(high))
            if first < COLUMNS:
                part = np.ones(last - first + 1)
                part[0] -= low - first
                part[-1] -= last + 1 - high
                level[first : last + 1] += np.clip(part, 0, 1) * _density(span, track)
    return levels


def _density(span: Span, track: Track) -> float:
    share = span.busy / max(1, span.end - span.begin)
    room = track.capacity or span.size
    return share * (span.size / room if span.kind in JOBS else 1.0)
