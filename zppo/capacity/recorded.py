"""A calibration read off a recorded run: how fast its machines were and what its questions are
like, from the timeline, `metrics.jsonl` and the rollouts.

Only what was written whole counts: spans that were merged say how busy an engine was, but not how
long a job took. The first steps are left out of the trainer's time, because it warms up in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from msgspec import Struct

from zppo.algorithm.window import PLAIN, TEACHER
from zppo.capacity.engine_curve import EngineRecord, Job, engines_of
from zppo.capacity.laws import accuracy_law, lengths_law, skill_after, trainer_speed
from zppo.capacity.settings import speed_settings
from zppo.config.served import served_student
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.processes import asked_teachers
from zppo.records import run_directory
from zppo.records.rollouts import read_step, step_files
from zppo.records.summary import read_lines, require_run
from zppo.records.timeline import JOBS, MICRO, TIMELINE, TRAIN, Span, Timeline, Track, read_timeline
from zppo.simulation import (
    Accuracies,
    Calibration,
    Engines,
    Graders,
    Lengths,
    Speeds,
    TrainerSpeed,
    warm_steps,
)

LEAST_STEPS = 6
"""so that some are left when the first ones are taken away"""
COLUMNS = (
    "question_id",
    "origin",
    "group_id",
    "kind",
    "length",
    "prompt_length",
    "correct",
)
OTHERS = ("compress", "hint", "judge")
"""Kinds of spans of a teacher that rewrites or judges; their lengths are known in sum alone."""
WRITTEN_KINDS = ("compress", "write_hint", "judge")
"""The same as kinds of tasks."""


class Recorded(Struct, frozen=True, kw_only=True):
    """What a run tells: of which topology it was, its calibration, and what a replay of it must
    come to."""

    topology: Topology
    calibration: Calibration
    steps: int
    warm: int
    """steps at its begin that `seconds_per_step` leaves out, as a simulation of it does"""
    seconds_per_step: float
    """without steps whose time holds the start of an attempt"""


class Group(Struct):
    """One group in the rollouts of a run."""

    kind: str
    question: str
    new: bool
    prompt: int | None
    lengths: list[int]
    correct: list[bool]


def read_recorded(run_dir: Path) -> Recorded:
    """Read a calibration off a run. Raises UserError where it does not tell enough."""
    require_run(run_dir)
    topology = run_directory.read(run_dir).topology
    timeline = read_timeline(run_dir)
    if timeline is None:
        raise UserError(
            f"--from-run: {str(run_dir)!r} has no timeline (the folder {TIMELINE}/ is missing or "
            "empty); expected a run of a version that records one: repeat some steps of it"
        )
    lines = read_lines(run_dir / "metrics.jsonl")
    if len(lines) < LEAST_STEPS:
        raise UserError(
            f"--from-run: {str(run_dir)!r} has {len(lines)} trained steps; expected at least "
            f"{LEAST_STEPS}, so launch it with a larger run.steps"
        )
    groups = _groups(run_dir)
    if not any(group.kind == PLAIN and group.lengths for group in groups.values()):
        raise UserError(
            f"--from-run: {str(run_dir)!r} has no rollouts with lengths; expected a run with "
            "sinks.rollouts: true"
        )
    warm = warm_steps(len(lines), topology.scheduler.max_staleness)
    accuracies = _accuracies(groups.values())
    calibration = Calibration(
        settings=speed_settings(topology),
        speeds=_speeds(topology, timeline, lines, groups, run_dir),
        lengths=_law(groups, {PLAIN}),
        lengths_of=_other_laws(groups, timeline, lines),
        accuracies=accuracies,
        prompt_tokens=_prompt_tokens(groups),
    )
    return Recorded(
        topology=topology,
        calibration=calibration,
        steps=len(lines),
        warm=warm,
        seconds_per_step=_seconds_per_step(timeline, lines[warm:]),
    )


def _seconds_per_step(timeline: Timeline, lines: Sequence[Mapping[str, Any]]) -> float:
    """Mean over steps, but for the first of each attempt, whose time holds its start."""
    started: set[int] = set()
    for track in timeline.tracks:
        trained = [span for span in track.spans if span.kind == TRAIN]
        for begin, _ in track.lives:
            started.update([span.step for span in trained if span.begin >= begin][:1])
    within = [line["time/step"] for line in lines if line["step"] not in started]
    return fmean(within or [line["time/step"] for line in lines])


# ---- questions -----------------------------------------------------------------------------------


def _groups(run_dir: Path) -> dict[str, Group]:
    """The groups in the rollouts of a run by their id."""
    found: dict[str, Group] = {}
    for path in step_files(run_dir / "rollouts"):
        for row in read_step(path, COLUMNS):
            group = found.get(row["group_id"])
            if group is None:
                group = found[row["group_id"]] = Group(
                    kind=row["kind"],
                    question=row["question_id"],
                    new=row["origin"] == "new",
                    prompt=row["prompt_length"],
                    lengths=[],
                    correct=[],
                )
            if row["length"] is not None:
                group.lengths.append(row["length"])
            if row["correct"] is not None:
                group.correct.append(row["correct"])
    return found


def _law(groups: Mapping[str, Group], kinds: set[str]) -> Lengths:
    chosen = [group for group in groups.values() if group.kind in kinds]
    pairs = [(group.question, length) for group in chosen for length in group.lengths]
    return lengths_law([question for question, _ in pairs], [length for _, length in pairs])


def _other_laws(
    groups: Mapping[str, Group], timeline: Timeline, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Lengths]:
    kinds = {group.kind for group in groups.values() if group.lengths} - {PLAIN}
    found = {kind: _law(groups, {kind}) for kind in sorted(kinds)}
    asked = sum(s.count for track in timeline.tracks for s in track.spans if s.kind in OTHERS)
    written = sum(line.get("compute/teacher_other_written", 0) for line in lines)
    if asked and written:
        usual = Lengths(values=(max(1, round(written / asked)),))
        found |= dict.fromkeys(WRITTEN_KINDS, usual)
    return found


def _accuracies(groups: Iterable[Group]) -> Accuracies:
    """Of new questions, which are a fair sample of the corpus; what teachers and other prompts add
    is seen in all groups."""
    graded = [group for group in groups if group.correct]
    fair = [group for group in graded if group.kind == PLAIN and group.new]
    rights, sizes = [sum(g.correct) for g in fair], [len(g.correct) for g in fair]
    law = accuracy_law(rights, sizes) if fair else Accuracies()
    plain = {g.question: g for g in graded if g.kind == PLAIN}
    teacher = [right for g in graded if g.kind.startswith(TEACHER) for right in g.correct]
    others = [g for g in graded if g.kind != PLAIN and not g.kind.startswith(TEACHER)]
    others = [g for g in others if g.question in plain]
    skills = [
        skill_after(law, sum(plain[g.question].correct), len(plain[g.question].correct))
        for g in others
    ]
    found: dict[str, float] = {}
    if teacher:
        found["teacher"] = round(fmean(teacher), 6)
    if others and fmean(skills) < 1.0:
        right = fmean([fmean(g.correct) for g in others])
        turned = (right - fmean(skills)) / (1.0 - fmean(skills))
        found["reformulated"] = round(min(1.0, max(0.0, turned)), 6)
    return Accuracies(alpha=law.alpha, beta=law.beta, values=law.values, **found)


def _prompt_tokens(groups: Mapping[str, Group]) -> int:
    own = [g.prompt for g in groups.values() if g.prompt and not g.kind.startswith(TEACHER)]
    return max(1, round(fmean(own))) if own else 1


# ---- speeds --------------------------------------------------------------------------------------


def _speeds(
    topology: Topology,
    timeline: Timeline,
    lines: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Group],
    run_dir: Path,
) -> Speeds:
    pools: dict[str, list[Track]] = defaultdict(list)
    for track in timeline.tracks:
        pools[track.pool].append(track)
    student, *asked = (
        _engines(pools[one.pool], groups, one.pool, run_dir)
        for one in [served_student(topology), *asked_teachers(topology)]
    )
    return Speeds(
        rollout=student,
        teachers=tuple(asked),
        trainer=_trainer(pools["trainer"], lines, topology),
        grader=_graders(pools["grader"]),
    )


def _engines(
    tracks: Sequence[Track], groups: Mapping[str, Group], pool: str, run_dir: Path
) -> Engines:
    records = [
        EngineRecord(list(_jobs(track, groups)), [_seconds(s) for s in _of_kind(track, "load")])
        for track in tracks
    ]
    loads = [s for track in tracks for s in _of_kind(track, "load") if s.step > 0 and s.count == 1]
    found = engines_of(
        records,
        slots=max((track.capacity for track in tracks), default=0) or 1,
        load_seconds=fmean([s.busy / MICRO for s in loads]) if loads else 0.0,
    )
    if found is None:
        raise UserError(
            f"--from-run: the timeline of {str(run_dir)!r} has no job of the pool {pool!r} whose "
            "lengths are known; write its speeds by hand (docs/plan.md) and give them with "
            "--calibration"
        )
    return found


def _jobs(track: Track, groups: Mapping[str, Group]) -> Iterator[Job]:
    for span in track.spans:
        if span.kind in JOBS and span.end > span.begin:
            begin, end = _seconds(span)
            group = groups.get(span.what) if span.count == 1 else None
            if group is not None and len(group.lengths) == round(span.size):
                yield Job(begin, end, span.size, tuple(group.lengths))
            else:
                yield Job(begin, end, span.size * span.busy / (span.end - span.begin))


def _trainer(
    tracks: Sequence[Track], lines: Sequence[Mapping[str, Any]], topology: Topology
) -> TrainerSpeed:
    spans = [span for track in tracks for span in track.spans]
    last = {span.step: span for span in spans if span.kind == TRAIN and span.count == 1}
    warm = warm_steps(len(lines), topology.scheduler.max_staleness)
    measured = [line for line in lines[warm:] if line["step"] in last]
    tokens = [float(line.get("compute/trained", 0)) for line in measured]
    seconds = [last[line["step"]].busy / MICRO for line in measured]
    if not sum(tokens):
        raise UserError(
            "--from-run: the timeline has no training step that metrics.jsonl counts the tokens "
            "of; expected a run of this version with at least "
            f"{LEAST_STEPS} steps in one attempt"
        )
    return trainer_speed(tokens, seconds, _after_training(spans, last))


def _after_training(spans: Sequence[Span], last: Mapping[int, Span]) -> float:
    """Mean time from the end of a step's updates until the trainer takes something else up."""
    others = sorted(s.begin for s in spans if s.kind in (TRAIN, "wait", "save"))
    ends = np.array([span.end for span in last.values()])
    places = np.searchsorted(others, ends)
    gaps = [others[i] - end for i, end in zip(places, ends, strict=True) if i < len(others)]
    return float(np.mean(gaps)) / MICRO if gaps else 0.0


def _graders(tracks: Sequence[Track]) -> Graders:
    spans = [span for track in tracks for span in _of_kind(track, "grade")]
    groups = sum(span.count for span in spans)
    return Graders(seconds=round(sum(s.busy for s in spans) / MICRO / max(1, groups), 6))


def _of_kind(track: Track, kind: str) -> list[Span]:
    return [span for span in track.spans if span.kind == kind]


def _seconds(span: Span) -> tuple[float, float]:
    return span.begin / MICRO, span.end / MICRO
