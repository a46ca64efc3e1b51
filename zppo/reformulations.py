"""Reformulated questions: how a hard question is rewritten so that the student answers it afresh (paper, step 4).

A reformulation says which visits admit it, draws the responses to show as candidates, and builds the prompt once the
candidates are compressed. BCQ and NCQ are the paper's; a new one is a class with these three methods.
"""

from __future__ import annotations

import random
from typing import Literal, Protocol

from zppo.prompts import PromptSet
from zppo.window import BCQ, NCQ, Candidate, Group, Visit
from zppo_protocol.messages import Prompt


class Reformulator(Protocol):
    """`kind` names the groups it builds. All methods are pure; randomness comes in as `rng`."""

    @property
    def kind(self) -> str: ...

    def admits(self, visit: Visit) -> bool:
        """Whether the visit's graded rollouts allow this rewriting."""

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        """The candidates in the order in which the prompt will show them, not yet compressed."""

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        """The rewritten prompt; every candidate has its compressed text."""


class BinaryCandidateIncluded:
    """BCQ: one correct teacher response and one wrong student response, shuffled, without label or position cue."""

    kind = BCQ

    def admits(self, visit: Visit) -> bool:
        return bool(_correct_teacher(visit)) and bool(visit.plain.indices(correct=False))

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        assert visit.teacher is not None
        right = candidate("teacher", visit.teacher, rng.choice(_correct_teacher(visit)))
        wrong = candidate("student", visit.plain, rng.choice(visit.plain.indices(correct=False)))
        shown = [right, wrong]
        rng.shuffle(shown)
        return shown

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        return prompts.bcq(visit.question, compressed_texts(candidates))


class NegativeCandidateIncluded:
    """NCQ: every wrong student response, after the list of their deduplicated answers, all said to be wrong."""

    kind = NCQ

    def admits(self, visit: Visit) -> bool:
        return bool(visit.plain.indices(correct=False))

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return [candidate("student", visit.plain, index) for index in visit.plain.indices(correct=False)]

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        wrong_answers = [c.answer for c in candidates if c.answer is not None]
        return prompts.ncq(visit.question, wrong_answers, compressed_texts(candidates))


def candidate(source: Literal["student", "teacher"], group: Group, index: int) -> Candidate:
    """The `index`-th graded response of a group as a candidate."""
    assert group.samples is not None and group.grades is not None
    grade = group.grades[index]
    text = group.samples.texts[index]
    return Candidate(source=source, index=index, text=text, answer=grade.answer, correct=grade.reward >= 1.0)


def compressed_texts(candidates: list[Candidate]) -> list[str]:
    texts = [c.compressed for c in candidates if c.compressed is not None]
    assert len(texts) == len(candidates), "a prompt was built before its candidates were compressed"
    return texts


def _correct_teacher(visit: Visit) -> list[int]:
    return visit.teacher.indices(correct=True) if visit.teacher is not None else []
