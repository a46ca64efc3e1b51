"""A timeline as a Chrome trace (JSON object format), which Perfetto and `chrome://tracing` open.

Each actor is a process of the trace over all attempts; its jobs lie in as many threads as there
were jobs at once, so that within a thread no two spans overlap. An arrow goes from the sampling of
a group to its grading, and from the last grading of a window to the step that trained it.

Source: Trace Event Format, Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zppo.algorithm.window import EVALUATE
from zppo.records.timeline import (
    DRAW,
    GRADE,
    GRADING,
    JOBS,
    PARTS,
    SAMPLE,
    START,
    TRAIN,
    WAIT,
    Span,
    Timeline,
    Track,
)

Event = dict[str, Any]
LANES_OF_ONE = 1000
"""Threads are numbered from a multiple of this, by what lies in them."""
ROWS: dict[str, tuple[str, ...]] = {
    "state": (START, WAIT, TRAIN, "publish", "save"),
    "parts of the step": PARTS,
    "weights": ("load",),
    "jobs": JOBS,
}


def chrome_trace(
    timeline: Timeline, staleness: Mapping[int, float], facts: Mapping[str, Any]
) -> Event:
    """The trace. `staleness`: mean of the tokens trained at each step, in versions. `facts` go into
    `otherData`."""
    events: list[Event] = []
    placed: list[tuple[Span, Event]] = []
    for pid, track in enumerate(timeline.tracks, start=1):
        events += _names(pid, track)
        slices = list(_slices(pid, track))
        placed += slices
        events += _threads(pid, slices)
        events += [event for _, event in slices]
        events += _running(pid, track)
        events += _staleness(pid, track, staleness)
    events += _arrows(placed)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"begun": timeline.wall, **facts},
    }


def _names(pid: int, track: Track) -> Iterator[Event]:
    yield _meta(pid, 0, "process_name", name=track.actor)
    yield _meta(pid, 0, "process_sort_index", sort_index=pid)
    for at, life in track.lives:
        yield {
            "ph": "i", "s": "p", "pid": pid, "tid": 0, "ts": at, "cat": "life",
            "name": f"attempt {life.run_id}, process {life.incarnation}",
        }  # fmt: skip


def _slices(pid: int, track: Track) -> Iterator[tuple[Span, Event]]:
    """Complete events, each in the first thread of its row that is free."""
    for number, kinds in enumerate(ROWS.values()):
        free: list[int] = []
        ends: list[tuple[int, int]] = []
        lanes = 0
        for span in (span for span in track.spans if span.kind in kinds):
            while ends and ends[0][0] <= span.begin:
                heapq.heappush(free, heapq.heappop(ends)[1])
            if free:
                lane = heapq.heappop(free)
            else:
                lane, lanes = lanes, lanes + 1
            # A span of no length would be lost to the eye, and two of them could not nest.
            end = max(span.end, span.begin + 1)
            heapq.heappush(ends, (end, lane))
            yield span, _slice(pid, number * LANES_OF_ONE + lane, span, end)


def _threads(pid: int, slices: Sequence[tuple[Span, Event]]) -> Iterator[Event]:
    """What the threads are called, and their order."""
    rows = list(ROWS)
    for tid in sorted({event["tid"] for _, event in slices}):
        row, lane = divmod(tid, LANES_OF_ONE)
        name = f"{rows[row]} {lane + 1}" if lane else rows[row]
        yield _meta(pid, tid, "thread_name", name=name)
        yield _meta(pid, tid, "thread_sort_index", sort_index=tid)


def _slice(pid: int, tid: int, span: Span, end: int) -> Event:
    arguments = {"step": span.step, "task": span.what, "size": span.size}
    if span.count > 1:
        arguments |= {"merged": span.count, "busy_us": span.busy}
    return {
        "ph": "X", "pid": pid, "tid": tid, "ts": span.begin, "dur": end - span.begin,
        "name": span.kind, "cat": span.kind, "args": arguments,
    }  # fmt: skip


def _running(pid: int, track: Track) -> Iterator[Event]:
    """Sequences in an engine's hands, at each change."""
    if not track.capacity:
        return
    changes: dict[int, float] = {}
    for span in track.spans:
        if span.kind in JOBS and span.end > span.begin:
            mean = span.size * span.busy / (span.end - span.begin)
            changes[span.begin] = changes.get(span.begin, 0.0) + mean
            changes[span.end] = changes.get(span.end, 0.0) - mean
    level = 0.0
    for at in sorted(changes):
        level += changes[at]
        yield _counter(pid, at, "sequences in hand", abs(round(level, 3)))


def _staleness(pid: int, track: Track, staleness: Mapping[int, float]) -> Iterator[Event]:
    for span in track.spans:
        if span.kind == TRAIN and span.step in staleness:
            yield _counter(pid, span.end, "staleness, versions", staleness[span.step])


def _arrows(placed: Sequence[tuple[Span, Event]]) -> Iterator[Event]:
    """Flow events: sample → grade of each group, last grade → training of each window."""
    sampled: dict[str, Event] = {}
    last_grade: dict[int, Event] = {}
    trained: dict[int, Event] = {}
    alone = [(span, event) for span, event in placed if span.count == 1]
    for span, event in alone:
        if span.kind in (SAMPLE, EVALUATE, DRAW):
            sampled[span.what] = event
        elif span.kind == TRAIN:
            trained[span.step] = event
    number = 0
    for span, event in alone:
        if span.kind != GRADE:
            continue
        source = sampled.get(span.what.removesuffix(GRADING))
        if source is not None and _end(source) <= event["ts"]:
            number += 1
            yield from _arrow(number, "graded", source, event)
        held = last_grade.get(span.step)
        if span.step >= 0 and (held is None or _end(event) > _end(held)):
            last_grade[span.step] = event
    for step, event in trained.items():
        source = last_grade.get(step)
        if source is not None and _end(source) <= event["ts"]:
            number += 1
            yield from _arrow(number, "trained", source, event)


def _arrow(number: int, name: str, source: Event, goal: Event) -> Iterator[Event]:
    """From the last microsecond of one slice to the first of another; `bp: e` binds it to the slice
    around it."""
    shared = {"cat": "flow", "name": name, "id": number}
    yield {
        "ph": "s", **shared, "pid": source["pid"], "tid": source["tid"], "ts": _end(source) - 1,
    }  # fmt: skip
    yield {
        "ph": "f", "bp": "e", **shared, "pid": goal["pid"], "tid": goal["tid"], "ts": goal["ts"],
    }  # fmt: skip


def _end(event: Event) -> int:
    return int(event["ts"] + event["dur"])


def _counter(pid: int, at: int, name: str, value: float) -> Event:
    return {"ph": "C", "pid": pid, "tid": 0, "ts": at, "name": name, "args": {"value": value}}


def _meta(pid: int, tid: int, kind: str, **arguments: str | int) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": kind, "args": arguments}
