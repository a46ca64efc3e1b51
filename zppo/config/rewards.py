"""`data.reward`: what a response earns, as a weighted sum of rewards.

Values of `data.reward` are checked as far as one entry goes by msgspec; what their uses are, and
whether their arguments fit, is checked where rewards are known (`zppo.grading`, `zppo.plan`).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct, field, structs

from zppo.config.base import Config
from zppo.errors import UserError

REWARD, REWARD_AND_TEACHER = "reward", "reward+teacher"
"""Graders of the questions of a run with `data.reward`: by grading workers alone, or with one part
that the teacher gives. The same with `:NAME` behind it where the question's row names the one part
that counts."""
DIGITS = 13
"""Decimal digits of the largest term that a weighted sum keeps; a float has 15."""
RUBRIC = "rubric"
"""The reward for which the teacher reads the whole response."""


class RewardConfig(Config, frozen=True, kw_only=True):
    """One part of what a response earns (docs/extending.md)."""

    use: str
    """math, exact, choice, judge, rubric, format, length, code, one that a package announces,
    package.module:name, or ./file.py:name"""
    weight: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None
    """what it is multiplied by; null in all entries: equal shares of 1"""
    args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the reward"""


class Part(Struct, frozen=True, kw_only=True):
    """An entry of `data.reward` under the short name by which metrics call it."""

    name: str
    use: str
    weight: float
    args: dict[str, Any]
    setting: str

    @property
    def of_teacher(self) -> bool:
        """Whether the teacher gives it, not a grading worker."""
        return self.use in ("judge", RUBRIC)


def parts_of(entries: Sequence[RewardConfig]) -> list[Part]:
    """The parts of a reward with their names and weights. Raises UserError if only some entries
    have a weight, or all weights are 0."""
    given = [entry.weight for entry in entries if entry.weight is not None]
    if given and len(given) < len(entries):
        raise UserError(
            f"data.reward: {len(given)} of {len(entries)} entries have a weight; expected all of "
            "them, or none for equal shares"
        )
    if given and not any(given):
        raise UserError("data.reward: every weight is 0; expected one that is not")
    seen: Counter[str] = Counter()
    parts = []
    for index, entry in enumerate(entries):
        short = entry.use.rpartition(":")[2]
        seen[short] += 1
        parts.append(
            Part(
                name=short if seen[short] == 1 else f"{short}-{seen[short]}",
                use=entry.use,
                weight=1.0 / len(entries) if entry.weight is None else entry.weight,
                args=entry.args,
                setting=f"data.reward[{index}]",
            )
        )
    return parts


@functools.lru_cache(maxsize=64)
def rule_of(grader: str) -> tuple[str, str]:
    """The grader of a question without, and the name of, the part that its row names."""
    rule, _, part = grader.partition(":")
    return rule, part


def chosen(parts: Sequence[Part], name: str) -> list[Part]:
    """The parts that count: all, or the one that a row names, as it is without its weight."""
    return [structs.replace(p, weight=1.0) for p in parts if p.name == name] if name else [*parts]


def weighted(parts: Sequence[Part], values: Mapping[str, float]) -> float:
    """Σ weight · value, rounded to what its terms are known to: shares of 1 of full marks are 1,
    and 0.7 and 0.1 are 0.8, in floating point too."""
    terms = [part.weight * values[part.name] for part in parts]
    largest = max(map(abs, terms), default=0.0)
    if not 0.0 < largest < math.inf:
        return math.fsum(terms)
    return round(math.fsum(terms), DIGITS - math.ceil(math.log10(largest)))
