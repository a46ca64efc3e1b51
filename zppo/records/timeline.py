"""The timeline of a run: what each of its processes did when, one file an actor in
`timeline/NAME.jsonl`.

A file holds the lives of one actor, in every attempt at the run. A life begins with a `Life`; what
follows are its `Span`s as JSON arrays, in the order in which they ended. All processes of a host
share one monotonic clock, which a step of the wall clock does not move, so spans of one boot are
aligned exactly. Those of another host are aligned by what its reports say of its clock
(`zppo.records.clocks`), boots of one host by the wall clock, read once when a life begins.

A file is bounded (`MAX_BYTES`): where it would pass that, the older three quarters of its spans
are merged, those of one kind that begin in the same interval, until half of the spans are left. A
merged span keeps the sum of durations and the mean size, so shares of time stay what they were;
what is lost is where inside of it the work lay. A line that cannot be read, as a killed process or
a full disk leaves it, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from zppo.algorithm.window import COMPRESS, EVALUATE, SCORE, TEACHER, WRITE_HINT
from zppo.config.topology import JUDGE
from zppo.records.clocks import Other, read_clocks

TIMELINE = "timeline"
MAX_BYTES = 1 << 20
"""of one actor's file"""
EXACT_SHARE = 4
"""One part in so many, the newest, is never merged."""
MICRO = 1_000_000
"""Spans are in microseconds."""

TRAIN, WAIT, START = "train", "wait", "start"
SAMPLE, DRAW, GRADE = "sample", "draw", "grade"
OF_TASKS = {
    TEACHER: DRAW,
    WRITE_HINT: "hint",
    **{kind: kind for kind in (EVALUATE, COMPRESS, JUDGE, SCORE, GRADE)},
}
"""What a task is called here, by its kind; `draw` is a teacher's answer to a question. Every other
kind is a prompt of the student's, a `sample`."""
JOBS = (SAMPLE, *OF_TASKS.values())
"""Kinds that the controller asks for."""
GRADING = f"/{GRADE}"
"""How the id of a grading task ends; before it stands the id of the group."""
PARTS = ("proximal", "update")
"""Kinds that lie inside of a `train`."""
KINDS = (START, WAIT, "load", *JOBS, TRAIN, *PARTS, "publish", "save")
LONGEST_NAME = 64
"""Characters of a task's id that a span keeps."""
Clock: TypeAlias = Annotated[float, Meta(ge=-1e11, le=1e11)]
Micros: TypeAlias = Annotated[int, Meta(ge=-(2**53), le=2**53)]
"""Further hosts write lines too: one beyond these bounds cannot be read."""


class Life(Struct, frozen=True, tag="life", tag_field="type"):
    """One process: `monotonic` and `wall` are its two clocks at the same moment, in seconds;
    `boot` names the clock that the first of them counts on."""

    run_id: str
    actor: str
    incarnation: int
    pid: int
    boot: str
    monotonic: Clock
    wall: Clock


class Room(Struct, frozen=True, tag="room", tag_field="type"):
    """Sequences that the engine of the life above takes at once; known once it is loaded."""

    capacity: int


class Span(Struct, array_like=True, frozen=True):
    """From `begin` to `end`, in microseconds since `Life.monotonic` in a file, since the origin of
    the run in a `Timeline`."""

    kind: str
    begin: Micros
    end: Micros
    step: int = -1
    """Window of a job, step of a training, version of weights; -1: none."""
    what: str = ""
    """The task, where there is one."""
    size: float = 1.0
    """Sequences of a job, responses graded, tokens trained; of merged ones the mean over time."""
    count: int = 1
    """How many were merged into it."""
    busy: Micros = 0
    """Sum of their durations, in microseconds."""


@dataclass(frozen=True)
class Track:
    """One actor over all attempts; spans in the order in which they begin."""

    actor: str
    lives: list[tuple[int, Life]]
    """(microseconds since the origin, life)"""
    spans: list[Span]
    capacity: int
    """of an engine, in sequences; 0 for others"""

    @property
    def pool(self) -> str:
        """Actors that do the same work: `rollout`, `teacher2`, `grader`, `trainer`."""
        name, _, number = self.actor.rpartition("-")
        return name if number.isdigit() else self.actor


@dataclass(frozen=True)
class Timeline:
    """A run, or a part of it, from `begin` to `end` in microseconds since the origin, at which the
    wall clock showed `wall`."""

    tracks: list[Track]
    wall: float
    begin: int
    end: int
    unreadable: int = 0
    """lines that could not be read"""

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / MICRO


def window_of(task_id: str) -> int:
    """The window that a task belongs to, which its id begins with; -1 for held-out questions."""
    window, *rest = task_id.split("/")
    # A held-out group is asked for at a step, which is no window, and so are its grades.
    return int(window) if window.isdigit() and EVALUATE not in rest[-2:] else -1


# ---- a file --------------------------------------------------------------------------------------

Line = Life | Room | Span
_OBJECT = msgspec.json.Decoder(Life | Room)
_SPAN = msgspec.json.Decoder(Span)
_ENCODER = msgspec.json.Encoder()


def encoded(lines: Iterable[Line]) -> bytes:
    """Lines of a file. The empty one before a life ends what a killed process left torn."""
    return b"".join(
        (b"\n" if isinstance(line, Life) else b"") + _ENCODER.encode(line) + b"\n" for line in lines
    )


def decoded(data: bytes) -> tuple[list[Line], int]:
    """The lines of a file, and how many could not be read."""
    lines: list[Line] = []
    unreadable = 0
    for text in data.split(b"\n"):
        if text.strip():
            try:
                lines.append((_SPAN if text.startswith(b"[") else _OBJECT).decode(text))
            except (msgspec.DecodeError, UnicodeDecodeError):
                unreadable += 1
    return lines, unreadable


def thinned(lines: Sequence[Line]) -> list[Line]:
    """The lines of a file with half as many spans; the newest of them as they are."""
    spans = [line for line in lines if isinstance(line, Span)]
    if len(spans) < 2 * EXACT_SHARE:
        return list(lines)
    exact = len(spans) // EXACT_SHARE
    old = len(spans) - exact
    most, seen, out = len(spans) // 2 - exact, 0, list[Line]()
    for is_span, group in groupby(lines, key=lambda line: isinstance(line, Span)):
        part = list(group)
        if is_span:
            of_life = [line for line in part if isinstance(line, Span)]
            early = of_life[: max(0, old - seen)]
            out += merged(early, max(1, most * len(early) // old)) if early else []
            out += of_life[len(early) :]
            seen += len(of_life)
        else:
            out += part
    return out


def merged(spans: Sequence[Span], most: int) -> list[Span]:
    """At most `most` spans, or one of each kind where those are more: spans of one kind that begin
    in the same interval become one. The interval starts at a millisecond and doubles until it is
    enough; nothing is merged where nothing needs to be."""
    interval, found = 1000, list(spans)
    kinds = len({span.kind for span in spans})
    while len(found) > max(most, kinds):
        groups: dict[tuple[str, int], list[Span]] = {}
        for span in found:
            groups.setdefault((span.kind, span.begin // interval), []).append(span)
        found = [_joined(group) for group in groups.values()]
        interval *= 2
    return sorted(found, key=lambda span: span.end)


def _joined(spans: list[Span]) -> Span:
    if len(spans) == 1:
        return spans[0]
    busy = sum(span.busy for span in spans)
    weight = sum(span.size * span.busy for span in spans)
    return Span(
        kind=spans[0].kind,
        begin=min(span.begin for span in spans),
        end=max(span.end for span in spans),
        step=min(span.step for span in spans),
        what=spans[0].what,
        size=round(weight / busy, 3) if busy else spans[0].size,
        count=sum(span.count for span in spans),
        busy=busy,
    )


# ---- a run ---------------------------------------------------------------------------------------


def read_timeline(run_dir: Path) -> Timeline | None:
    """The timeline of a run, live, finished or dead; None where no process has left one, as in runs
    of earlier versions."""
    files = sorted((run_dir / TIMELINE).glob("*.jsonl"))
    found = {file.stem: decoded(file.read_bytes()) for file in files}
    lives = [life for lines, _ in found.values() for life in lines if isinstance(life, Life)]
    if not lives:
        return None
    offsets = _offsets(lives, read_clocks(run_dir / TIMELINE))
    origin = min(life.monotonic + offsets[life.boot] for life in lives)
    tracks = [
        _track(name, lines, offsets, origin)
        for name, (lines, _) in sorted(found.items(), key=lambda item: _place(item[0]))
    ]
    return Timeline(
        tracks=[track for track in tracks if track.spans],
        wall=origin,
        begin=0,
        end=max((span.end for track in tracks for span in track.spans), default=0),
        unreadable=sum(count for _, count in found.values()),
    )


def last(timeline: Timeline, seconds: float) -> Timeline:
    """The last `seconds` of it. What began before is cut there, in proportion."""
    return between(timeline, timeline.end - round(seconds * MICRO), timeline.end)


def between(timeline: Timeline, begin: int, end: int) -> Timeline:
    """What lies between two moments, in microseconds since the origin."""
    begin = max(begin, timeline.begin)
    tracks = [
        Track(
            track.actor,
            track.lives,
            [_cut(s, begin, end) for s in track.spans if s.end > begin and s.begin < end],
            track.capacity,
        )
        for track in timeline.tracks
    ]
    return Timeline(tracks, timeline.wall, begin, end, timeline.unreadable)


def _cut(span: Span, begin: int, end: int) -> Span:
    if span.begin >= begin and span.end <= end:
        return span
    low, high = max(span.begin, begin), min(span.end, end)
    share = (high - low) / max(1, span.end - span.begin)
    return msgspec.structs.replace(span, begin=low, end=high, busy=round(span.busy * share))


def _offsets(lives: list[Life], clocks: Mapping[str, Other]) -> dict[str, float]:
    """Wall clock minus monotonic clock of each boot, as its first process read them; of further
    hosts by the wall clock of the first host."""
    first: dict[str, Life] = {}
    for life in sorted(lives, key=lambda life: life.monotonic):
        first.setdefault(life.boot, life)
    walls = {boot: life.wall - life.monotonic for boot, life in first.items()}
    placed = {
        boot: walls[clocks[boot].boot] + clocks[boot].seconds
        for boot in walls
        if boot in clocks and clocks[boot].boot in walls
    }
    return walls | placed


def _track(name: str, lines: list[Line], offsets: dict[str, float], origin: float) -> Track:
    lives: list[tuple[int, Life]] = []
    spans: list[Span] = []
    capacity = 0
    for line in lines:
        match line:
            case Life():
                if lives and lives[-1][1] == line:
                    continue  # said again after a write that failed
                since = line.monotonic + offsets[line.boot] - origin
                lives.append((round(since * MICRO), line))
            case Room():
                capacity = line.capacity
            case Span() if lives:
                at = lives[-1][0]
                spans.append(
                    msgspec.structs.replace(line, begin=at + line.begin, end=at + line.end)
                )
    return Track(name, lives, sorted(spans, key=lambda span: span.begin), capacity)


def _place(name: str) -> tuple[int, str, int]:
    """The trainer first, then engines, teachers, graders, carriers of weights; by number."""
    pool, _, number = name.rpartition("-")
    if not number.isdigit():
        pool, number = name, "0"
    order = ("trainer", "rollout", "teacher", "grader", "weights")
    role = pool.rstrip("0123456789")
    return (order.index(role) if role in order else len(order)), pool, int(number)
