"""Who worked, who waited, and for whom: figures of a timeline, the same wherever they appear.

The trainer's time is divided without rest: into its own work, and its waiting, each moment of
which is laid to those who were at work on the oldest window at that moment, in equal parts. A
moment in which nobody was is the controller's: messages on their way, and decisions. The bottleneck
is whoever has the largest part, because whatever shortens that part shortens the run.

Spans that were merged still say how much was done, and no longer when. So shares of time come from
durations alone, and whose the waiting was from the waits that are whole, which stand for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zppo.records.timeline import JOBS, MICRO, START, WAIT, Span, Timeline, Track

TRAINER, CONTROLLER = "trainer", "controller"


@dataclass(frozen=True)
class PoolWork:
    """Shares are of the time in which the pool's processes lived within the timeline."""

    pool: str
    processes: int
    busy: float
    """share of time with work in hand, mean over processes"""
    room: float | None
    """of an engine: share of its room for sequences that was in use"""


@dataclass(frozen=True)
class Work:
    """`seconds`: time in which the trainer worked or waited; `parts` divide it."""

    seconds: float
    parts: dict[str, float]
    """trainer, the pools it waited for, controller → share; they add up to 1"""
    pools: list[PoolWork]

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def waiting(self) -> float:
        """Share of the trainer's time in which it had no window."""
        return sum(share for name, share in self.parts.items() if name != TRAINER)


def work_of(timeline: Timeline) -> Work | None:
    """None where the trainer has done nothing yet."""
    trainer = next((track for track in timeline.tracks if track.pool == TRAINER), None)
    total = _lived(trainer, timeline) if trainer is not None else 0
    if trainer is None or total == 0:
        return None
    waited = _waited(trainer) / total
    waits = [span for span in trainer.spans if span.kind == WAIT and span.busy]
    blamed = _blamed([span for span in waits if span.count == 1] or waits, timeline.tracks)
    parts = {TRAINER: 1 - waited}
    parts |= {name: waited * time / blamed.total() for name, time in blamed.most_common()}
    return Work(total / MICRO, parts, _pools(timeline))


def sentence_of(work: Work) -> str:
    """The run's time in one sentence, with the bottleneck by name."""
    waits = [
        f"{_percent(share)} for the {_called(work, name)}"
        for name, share in work.parts.items()
        if name != TRAINER and share >= 0.005
    ]
    waited = f" and waited {_percent(work.waiting)}: {', '.join(waits)}" if waits else ""
    return (
        f"Of {work.seconds:,.0f} s the trainer worked {_percent(work.parts[TRAINER])}{waited}. "
        f"The bottleneck was the {_called(work, work.bottleneck)}."
    )


def shares_of(work: Work) -> str:
    """The busy shares of all pools in one line."""
    return "At work: " + "; ".join(_pool_text(pool) for pool in work.pools) + "."


def _pool_text(pool: PoolWork) -> str:
    many = f" ({pool.processes})" if pool.processes > 1 else ""
    whose = "their" if pool.processes > 1 else "its"
    room = "" if pool.room is None else f", {_percent(pool.room)} of {whose} room"
    return f"{pool.pool}{many} {_percent(pool.busy)}{room}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _called(work: Work, name: str) -> str:
    """A pool in the sentence: `rollout engines`, or `rollout engine` where there is one."""
    many = any(pool.pool == name and pool.processes > 1 for pool in work.pools)
    return f"{name} engine{'s' if many else ''}" if name == "rollout" else name + "s" * many


# ---- one pool ------------------------------------------------------------------------------------


def _pools(timeline: Timeline) -> list[PoolWork]:
    pools: dict[str, list[Track]] = {}
    for track in timeline.tracks:
        pools.setdefault(track.pool, []).append(track)
    found = []
    for pool, tracks in pools.items():
        lived = {track.actor: _lived(track, timeline) for track in tracks}
        time = sum(lived.values())
        if time > 0:
            busy = 1 - sum(map(_waited, tracks)) / time
            space = sum(track.capacity * lived[track.actor] for track in tracks)
            used = sum(s.size * s.busy for track in tracks for s in track.spans if s.kind in JOBS)
            room = min(1.0, used / space) if space else None
            found.append(PoolWork(pool, len(tracks), busy, room))
    return found


def _lived(track: Track, timeline: Timeline) -> int:
    """Microseconds in which the actor was loaded and there, from the end of each start to the last
    sign of that life."""
    # A life after a reboot lies before the others if the wall clock was set back meanwhile.
    starts = sorted(at for at, _ in track.lives)
    total = 0
    for at, until in zip(starts, [*starts[1:], timeline.end + 1], strict=True):
        own = [span for span in track.spans if at <= span.begin < until and span.kind != START]
        if own:
            total += max(span.end for span in own) - min(span.begin for span in own)
    return total


def _waited(track: Track) -> int:
    """Microseconds in which it had nothing to do. An actor's waits are never at once, so their sum
    stays what it was when they are merged."""
    return sum(span.busy for span in track.spans if span.kind == WAIT)


# ---- whose the waiting was -----------------------------------------------------------------------


def _blamed(waits: Sequence[Span], tracks: Sequence[Track]) -> Counter[str]:
    """Microseconds of the waits by pool."""
    blamed: Counter[str] = Counter()
    opened: dict[int, Counter[str]] = {}
    before, waiting = 0, False
    for at, step, pool, change in _events(waits, tracks):
        if waiting and at > before:
            pools = _oldest(opened)
            for name in pools:
                blamed[name] += (at - before) / len(pools)  # type: ignore[assignment]
        before = at
        if pool == WAIT:
            waiting = change > 0
        else:
            counts = opened.setdefault(step, Counter())
            counts[pool] += change
            if not counts[pool]:
                del counts[pool]
            if not counts:
                del opened[step]
    return blamed


def _events(waits: Sequence[Span], tracks: Sequence[Track]) -> Iterator[tuple[int, int, str, int]]:
    """(moment, window, pool, +1 or -1) of the jobs and the waits, in order."""
    found = [(at, 0, WAIT, go) for s in waits for at, go in ((s.begin, 1), (s.end, -1))]
    for track in tracks:
        for span in track.spans:
            if span.kind in JOBS and span.end > span.begin:
                found.append((span.begin, span.step, track.pool, 1))
                found.append((span.end, span.step, track.pool, -1))
    return iter(sorted(found, key=lambda event: event[0]))


def _oldest(opened: dict[int, Counter[str]]) -> list[str]:
    """Pools at work on the oldest window; held-out questions have none and come last."""
    if not opened:
        return [CONTROLLER]
    return list(opened[min(opened, key=lambda step: (step < 0, step))])
