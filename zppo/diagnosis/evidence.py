"""What a rule may look at, and what it says: `Evidence` in, `Advisory` out.

Evidence is the first and the newest lines of `metrics.jsonl`, never the whole file, so that a run
of any length can be judged at every step. A run that goes on is judged only once the asked number
of steps is there; one that has ended, by as many as it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, TypeAlias

from msgspec import Struct

Line: TypeAlias = Mapping[str, Any]
Severity: TypeAlias = Literal["severe", "warning"]
FIRST_LINES, NEWEST_LINES = 10, 200
"""How many lines are looked at."""


class Advisory(Struct, frozen=True, kw_only=True):
    """One finding. `rule` is a stable id, `found` the evidence in words, `numbers` the same by name
    of metric, `change` what to look at, `settings` the settings that it names."""

    rule: str
    severity: Severity
    found: str
    change: str
    settings: list[str]
    numbers: dict[str, float]

    @property
    def sentence(self) -> str:
        """Finding and remedy in one line."""
        return f"{self.severity} {self.rule}: {self.found}; {self.change}"


class Evidence(Struct, frozen=True, kw_only=True):
    """`first` and `newest` may overlap. `silent_windows` is `run.silent_teacher_windows`."""

    first: Sequence[Line]
    newest: Sequence[Line]
    ended: bool = False
    silent_windows: int = 3

    @classmethod
    def of(cls, lines: Sequence[Line], *, ended: bool = False, silent_windows: int = 3) -> Evidence:
        """The evidence in all lines of a run."""
        return cls(
            first=lines[:FIRST_LINES],
            newest=lines[-NEWEST_LINES:],
            ended=ended,
            silent_windows=silent_windows,
        )

    def last(self, steps: int) -> Sequence[Line]:
        """The last `steps` lines; none while a run that goes on has fewer."""
        enough = len(self.newest) >= steps or self.ended
        return self.newest[-steps:] if enough else []

    def full(self, steps: int) -> bool:
        """Whether there are so many lines. Speeds of a run that ended before are those of its start
        and its end."""
        return len(self.newest) >= steps

    def values(self, name: str, steps: int) -> list[float]:
        """A metric over the last `steps` lines, where it was measured."""
        return measured(self.last(steps), name)

    def mean(self, name: str, steps: int) -> float | None:
        return mean(self.values(name, steps))

    def weighted(self, name: str, weight: str, steps: int) -> float | None:
        """Mean over the last lines, each counted by another metric of its own."""
        pairs = [(line[name], line.get(weight, 0)) for line in self.last(steps) if name in line]
        total = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / total if total else None

    def total(self, name: str, steps: int) -> float:
        return sum(self.values(name, steps))

    def families(self, prefix: str, suffix: str) -> list[str]:
        """What stands between prefix and suffix in the names of the newest lines."""
        names = dict.fromkeys(name for line in self.newest for name in line)
        return [
            name.removeprefix(prefix).removesuffix(suffix)
            for name in names
            if name.startswith(prefix) and name.endswith(suffix)
        ]


def measured(lines: Iterable[Line], name: str) -> list[float]:
    return [float(line[name]) for line in lines if line.get(name) is not None]


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value == 0 or value >= 0.01 else f"{100 * value:.2g} %"
