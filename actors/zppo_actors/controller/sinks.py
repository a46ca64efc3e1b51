"""The run's own files: where its numbers go first, and how they are rolled back when it resumes.

`metrics.jsonl` (one line a trained step), `fates.jsonl` (one line per question that enters or
leaves the buffer), `heldout.jsonl` (one line an evaluation), and the rollout store. After a resume
at step N every file holds exactly what the policy of that checkpoint has lived through: lines of
steps >= N are cut before the first new one. What else is to hear of a step is `zppo_actors.sinks`.

Durability: each line is handed to the operating system whole, so a killed process tears at most its
last line and the next open mends that; `sync` forces the disk and is called before a checkpoint is
committed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from zppo.algorithm.composition import trained_members
from zppo.algorithm.steps import Fate
from zppo.config.sinks import SinksConfig
from zppo.records import rollouts
from zppo.records.atomic_file import written_whole
from zppo.records.metrics import LASTING_FATES, Scalars, outcomes
from zppo.records.summary import read_lines
from zppo.scheduling.events import Trained
from zppo.scheduling.heldout import EvaluationResult


class LineSink:
    """An append-only JSONL file. `keep` says which of the lines found at opening stay; torn last
    lines never do."""

    def __init__(
        self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True
    ) -> None:
        kept = [line for line in read_lines(path) if keep(line)]
        self.last: dict[str, Any] = kept[-1] if kept else {}
        if path.exists():
            _rewrite(path, kept)
        self._file = path.open("ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


class MetricSinks:
    """All files of one run; the controller owns it. `resume_step` is the step of the checkpoint,
    None for a new run.

    Held-out lines at the resume step itself stay: they measured the very policy that is resumed. An
    evaluation that a later policy took part in goes: that policy is lost.
    """

    def __init__(
        self,
        run_dir: Path,
        config: SinksConfig,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bound = float("inf") if resume_step is None else resume_step
        self._steps = LineSink(run_dir / "metrics.jsonl", lambda line: line["step"] < bound)
        self._fates = LineSink(run_dir / "fates.jsonl", lambda line: line["step"] < bound)
        self._heldout = LineSink(
            run_dir / "heldout.jsonl",
            lambda line: line.get("newest_version", line["step"]) <= bound,
        )
        self._rollouts = run_dir / "rollouts" if config.rollouts else None
        if resume_step is not None:
            rollouts.roll_back(run_dir / "rollouts", resume_step)
        self._clock = clock
        self._elapsed = float(self._steps.last.get("wall_seconds", 0.0))
        self._start = clock() - self._elapsed

    def write(self, step: int, metrics: Scalars) -> Scalars:
        """Write one trained step and return the line. `wall_seconds` and `time/step` are measured
        here unless given."""
        elapsed = self._clock() - self._start
        line: Scalars = {
            "step": step,
            "wall_seconds": elapsed,
            "time/step": elapsed - self._elapsed,
            **metrics,
        }
        self._elapsed = elapsed
        self._steps.write(line)
        return line

    def write_fate(self, step: int, fates: Iterable[Fate]) -> None:
        """Write what entered and left the buffer at this step; fates that changed nothing have no
        line."""
        for fate in fates:
            if fate.fate in LASTING_FATES:
                self._fates.write({"step": step, **msgspec.structs.asdict(fate)})

    def write_heldout(self, result: EvaluationResult) -> None:
        """Write an evaluation of the policy after `result.step` trained steps."""
        self._heldout.write(msgspec.structs.asdict(result))

    def write_rollouts(self, step: int, trained: Trained) -> None:
        """Write what was trained to the rollout store, if the topology asks for it."""
        if self._rollouts is not None:
            members = trained_members(composition for _, composition in trained.composed)
            outcome = outcomes(trained.fates)
            rollouts.write_step(self._rollouts, step, trained.window, outcome, members)

    def sync(self) -> None:
        """Force everything written so far to the disk; called before a checkpoint is committed."""
        for sink in (self._steps, self._fates, self._heldout):
            sink.sync()

    def close(self) -> None:
        for sink in (self._steps, self._fates, self._heldout):
            sink.close()


def _rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file as a whole, so that a crash leaves either the old lines or the kept ones."""
    with written_whole(path, synced=True) as file:
        file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
