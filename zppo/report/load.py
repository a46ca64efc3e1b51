"""What the report knows of a run: the records of its directory, and series and counts drawn from
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct

from zppo.diagnosis.examine import diagnosed
from zppo.records.summary import Record, read_lines, require_run, topology_value

MAX_BINS = 8
"""As many bins as there are colours that colour-blind readers can tell apart."""


class Series(NamedTuple):
    """A metric over the steps that have it; empty arrays if none has."""

    steps: np.ndarray
    values: np.ndarray


class RunData(Struct, kw_only=True):
    run_dir: Path
    run: Record
    steps: list[Record]
    fates: list[Record]
    heldout: list[Record]
    summary: Record

    def series(self, name: str) -> Series:
        """A metric of `metrics.jsonl` by name."""
        points = [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return Series(np.array(steps, dtype=int), np.array(values, dtype=float))

    def column(self, name: str) -> np.ndarray:
        """A metric for every step, 0 where a step does not have it."""
        return np.array([line.get(name, 0) for line in self.steps], dtype=float)

    def step_numbers(self) -> np.ndarray:
        return np.array([line["step"] for line in self.steps], dtype=int)

    def setting(self, *path: str, default: Any = None) -> Any:
        """A value of the resolved topology."""
        return topology_value(self.run, *path, default=default)

    def families(self, prefix: str) -> dict[float, np.ndarray]:
        """Metrics `<prefix>/<entry>` by entry accuracy, each for every step, in rising order of
        entry."""
        names = {name for line in self.steps for name in line if name.startswith(f"{prefix}/")}
        found = {float(name.rpartition("/")[2]): self.column(name) for name in names}
        merged: dict[float, np.ndarray] = {}
        merge = merger(list(found))
        for entry in sorted(found):
            merged[merge(entry)] = merged.get(merge(entry), 0) + found[entry]
        return merged

    def fate_counts(self, fate: str) -> Counter[float]:
        """How many questions met this fate, by entry accuracy; bins are the same for all fates."""
        merge = self._merge_entries()
        return Counter(merge(line["entry_accuracy"]) for line in self.fates if line["fate"] == fate)

    def fate_steps(self, fate: str) -> dict[float, np.ndarray]:
        """At which steps questions met this fate, by entry accuracy, in rising order of entry."""
        merge = self._merge_entries()
        steps: dict[float, list[int]] = {}
        for line in self.fates:
            if line["fate"] == fate:
                steps.setdefault(merge(line["entry_accuracy"]), []).append(line["step"])
        return {entry: np.array(steps[entry]) for entry in sorted(steps)}

    def _merge_entries(self) -> Callable[[float], float]:
        return merger([line["entry_accuracy"] for line in self.fates])


def merger(entries: list[float]) -> Callable[[float], float]:
    """Bins are the entry accuracies themselves; if too many to tell apart, steps of 12.5 % (the
    paper's)."""
    if len({round(entry, 6) for entry in entries}) <= MAX_BINS:
        return lambda entry: round(entry, 6)
    return lambda entry: int(entry * 8) / 8


def load_run(run_dir: Path) -> RunData:
    """Read a run directory. Raises UserError if it is none."""
    return RunData(
        run_dir=run_dir,
        run=require_run(run_dir),
        steps=read_lines(run_dir / "metrics.jsonl"),
        fates=read_lines(run_dir / "fates.jsonl"),
        heldout=read_lines(run_dir / "heldout.jsonl"),
        summary=diagnosed(run_dir),
    )
