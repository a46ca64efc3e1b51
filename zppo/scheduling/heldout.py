"""Held-out accuracy: the student answers questions it never trains on, a few samples each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from zppo.algorithm.window import Group
from zppo_protocol.values import FROZEN


class EvaluationResult(Struct, frozen=True, kw_only=True):
    """Mean accuracy over questions with its 95 % normal interval (the unit of sampling is the
    question). Responses whose reward failed are neither right nor wrong; a question of which no
    other is left is not counted.

    `step` is the policy version that was asked for; `newest_version` the latest that sampled a
    token. They differ only in the middle of a run, where generation goes on while new weights come.
    """

    step: int
    newest_version: int
    accuracy: float
    low: float
    high: float
    questions: int
    samples: int
    by_question: dict[str, float] = {}
    """Share of correct rollouts of each question, so that two runs can be compared question by
    question."""


class Estimate(Struct, frozen=True):
    """A share with its 95 % normal interval over questions, cut off at 0 and 1."""

    value: float
    low: float
    high: float


class Evaluation(Struct, kw_only=True):
    """The groups of one evaluation. `step` is the policy version it asks for; later versions may
    answer as well."""

    step: int
    groups: list[Group]
    question_ids: list[str]

    @property
    def done(self) -> bool:
        return all(group.done for group in self.groups)

    def result(self) -> EvaluationResult | None:
        """What is known once all groups are done; None where no reward could be had."""
        by_question = {
            question: group.accuracy
            for question, group in zip(self.question_ids, self.groups, strict=True)
            if group.known
        }
        if not by_question:
            return None
        accuracy = estimate([*by_question.values()])
        return EvaluationResult(
            step=self.step,
            newest_version=max([self.step, *(newest_version(group) for group in self.groups)]),
            accuracy=accuracy.value,
            low=accuracy.low,
            high=accuracy.high,
            questions=len(by_question),
            samples=sum(len(group.correctness()) for group in self.groups),
            by_question=by_question,
        )


def newest_version(group: Group) -> int:
    """The latest policy version that sampled a token of the group; FROZEN if none is known."""
    if group.samples is None:
        return FROZEN
    return int(group.samples.version_spans[:, 1].max(initial=FROZEN))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of per-question values and its interval."""
    mean, half = mean_and_half_width(values)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % normal interval (0 for fewer than two values)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))
