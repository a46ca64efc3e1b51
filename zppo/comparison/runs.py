"""Which runs of a comparison are left to do, how each is started or continued, and what is said
meanwhile.

Pure but for reading run directories: starting processes and looking at the clock is the door's
(`zppo.compare`). Invariant: a finished run is never started again, and a run that can be continued
is never begun anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from msgspec import Struct

from zppo.comparison.record import Pair, run_folder
from zppo.errors import EXIT_USER_ERROR, count_of
from zppo.records import checkpoint
from zppo.records.summary import Record as Line
from zppo.records.summary import read_lines, require_run, summarise, topology_value
from zppo.report.sentences import duration

State: TypeAlias = Literal["finished", "unfinished", "stranded", "absent"]
"""`stranded`: a run directory without a whole checkpoint to continue from."""


class Progress(Struct, frozen=True, kw_only=True):
    """How far a run has come."""

    state: State
    steps: int = 0
    verdict: str | None = None


def progress_of(directory: Path) -> Progress:
    """What a run directory says of itself. Raises UserError for a damaged one."""
    if not (directory / "run.json").is_file():
        return Progress(state="stranded" if directory.exists() else "absent")
    summary = summarise(directory)
    verdict = summary["verdict"]
    if _finished(directory, summary):
        state: State = "finished"
    else:
        state = "stranded" if checkpoint.find_latest(directory).folder is None else "unfinished"
    return Progress(state=state, steps=summary["steps"], verdict=verdict)


def _finished(directory: Path, summary: Line) -> bool:
    """By its verdict; or by its numbers, for a run whose last word was lost after everything was
    done."""
    if str(summary["verdict"]).startswith("finished"):
        return True
    run = require_run(directory)
    steps = topology_value(run, "run", "steps")
    evaluated = {line["step"] for line in read_lines(directory / "heldout.jsonl")}
    measured = topology_value(run, "data", "heldout") is None or steps in evaluated
    return steps is not None and summary["steps"] == steps and measured


def command(
    pair: Pair, state: State, topology: Path, overrides: Sequence[str], out: Path
) -> list[str]:
    """The command line that begins or continues a run."""
    base = [sys.executable, "-P", "-m", "zppo.launch"]
    if state == "unfinished":
        return [*base, "--resume", str(run_folder(out, pair))]
    settings = [
        part for setting in (*overrides, *pair.settings(out)) for part in ("--set", setting)
    ]
    return [*base, "--topology", str(topology), *settings]


def set_aside(directory: Path) -> Path:
    """Make room for a run that must begin anew: its old directory is renamed, not removed. Returns
    the new name."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.abandoned-{number}")).exists():
        number += 1
    return directory.rename(aside)


# ---- what is said --------------------------------------------------------------------------------


class Clock(Struct):
    """Seconds that each run of this call took, for the estimate of the time left."""

    total: int
    seconds: dict[Pair, float] = {}

    def left(self, pairs: Sequence[Pair]) -> float | None:
        """Seconds that `pairs` will take: as long as their method took so far, or any method where
        it has not run."""
        if not self.seconds:
            return None
        overall = sum(self.seconds.values()) / len(self.seconds)
        means: dict[str, list[float]] = {}
        for pair, seconds in self.seconds.items():
            means.setdefault(pair.method, []).append(seconds)
        return sum(
            sum(means[pair.method]) / len(means[pair.method]) if pair.method in means else overall
            for pair in pairs
        )


def begin_line(number: int, clock: Clock, pair: Pair, state: State, left: Sequence[Pair]) -> str:
    """`[3/6] zppo seed 1: begins (about 2 min 5 s left)`."""
    estimate = clock.left(left)
    about = f" (about {duration(estimate)} left)" if estimate is not None else ""
    verb = "goes on from its last checkpoint" if state == "unfinished" else "begins"
    return f"[{number}/{clock.total}] {pair.method} seed {pair.seed}: {verb}{about}"


def kept_line(number: int, clock: Clock, pair: Pair, progress: Progress) -> str:
    return (
        f"[{number}/{clock.total}] {pair.method} seed {pair.seed}: finished before, "
        f"{count_of(progress.steps, 'step')}"
    )


def end_line(number: int, clock: Clock, pair: Pair, directory: Path, seconds: float) -> str:
    """`[3/6] zppo seed 1: 80 steps in 2 min 34 s, held-out 41.2 % → 85.0 %`."""
    summary = summarise(directory)
    ends = (summary["heldout_before"], summary["heldout_after"])
    shares = " → ".join("–" if value is None else f"{100 * value:.1f} %" for value in ends)
    name = f"[{number}/{clock.total}] {pair.method} seed {pair.seed}"
    return f"{name}: {count_of(summary['steps'], 'step')} in {duration(seconds)}, held-out {shares}"


def failed_line(number: int, clock: Clock, pair: Pair, reason: str) -> str:
    return f"[{number}/{clock.total}] {pair.method} seed {pair.seed}: FAILED: {reason}"


def reason(directory: Path, output: str, exit_code: int) -> str:
    """Why a run did not finish, in one sentence: its verdict, else the last thing it said that is a
    sentence."""
    verdict = progress_of(directory).verdict if directory.is_dir() else None
    if verdict is not None and exit_code != EXIT_USER_ERROR:
        return verdict
    hints = ("continue:", "report:", "the last lines of", " ")
    lines = [
        line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith(hints)
    ]
    return lines[-1] if lines else f"it ended with exit code {exit_code} and said nothing"
