"""Reformulated questions: how a hard question is rewritten so that the student answers it afresh
(paper, step 4).

A reformulation says which visits admit it, draws the responses that it is made from, and builds the
prompt once these candidates are prepared. BCQ and NCQ are ZPPO's, Hint and Prefix those of
Algorithms 5 and 6; a new one is a class with these three methods.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal, Protocol, TypeAlias

from zppo.algorithm.window import BCQ, HINT, NCQ, PREFIX, Candidate, Group, Visit
from zppo.prompting.prompts import PromptSet
from zppo_protocol.values import Prompt

Preparation: TypeAlias = Literal["compress", "write_hint", "none"]


class Reformulator(Protocol):
    """All methods are pure; randomness comes in as `rng`."""

    @property
    def kind(self) -> str:
        """Name of the groups it builds."""

    @property
    def preparation(self) -> Preparation:
        """What the teacher does with a candidate before it is shown: compress it, write a hint from
        it, or nothing."""

    def admits(self, visit: Visit) -> bool:
        """Whether the visit's graded rollouts allow this rewriting."""

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        """The candidates in the order in which the prompt will show them, not yet prepared."""

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        """The rewritten prompt; every candidate has its `shown` text."""


class BinaryCandidateIncluded:
    """BCQ: one correct teacher response and one student response that was found wrong, shuffled,
    without label or position cue."""

    kind = BCQ
    preparation: Preparation = "compress"

    def admits(self, visit: Visit) -> bool:
        return bool(_correct_teacher(visit)) and bool(visit.plain.found_wrong())

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        assert visit.teacher is not None
        right = candidate("teacher", visit.teacher, rng.choice(_correct_teacher(visit)))
        wrong = candidate("student", visit.plain, rng.choice(visit.plain.found_wrong()))
        shown = [right, wrong]
        rng.shuffle(shown)
        return shown

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        return prompts.bcq(visit.question, shown_texts(candidates))


class NegativeCandidateIncluded:
    """NCQ: every student response that was found wrong, after the list of their deduplicated
    answers, all said to be wrong."""

    kind = NCQ
    preparation: Preparation = "compress"

    def admits(self, visit: Visit) -> bool:
        return bool(visit.plain.found_wrong())

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return [candidate("student", visit.plain, index) for index in visit.plain.found_wrong()]

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        wrong_answers = [c.answer for c in candidates if c.answer is not None]
        counts = [c.count for c in candidates]
        return prompts.ncq(visit.question, wrong_answers, shown_texts(candidates), counts)


class Hint:
    """Algorithm 5: the question with a hint without the answer, which the teacher writes from a
    correct response."""

    kind = HINT
    preparation: Preparation = "write_hint"

    def admits(self, visit: Visit) -> bool:
        return bool(_correct_teacher(visit))

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return [_drawn_trace(visit, rng)]

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        [hint] = shown_texts(candidates)
        return prompts.hint(visit.question, hint)


class Prefix:
    """Algorithm 6: the student goes on from the first α of the tokens of a correct teacher
    response."""

    kind = PREFIX
    preparation: Preparation = "none"

    def admits(self, visit: Visit) -> bool:
        return bool(_correct_teacher(visit))

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return [_drawn_trace(visit, rng)]

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        [trace] = shown_texts(candidates)
        return prompts.prefix(visit.question, trace)


def candidate(source: Literal["student", "teacher"], group: Group, index: int) -> Candidate:
    """The `index`-th graded response of a group as a candidate."""
    grade, text = group.the_grades[index], group.the_samples.texts[index]
    return Candidate(
        source=source,
        index=index,
        text=text,
        answer=grade.answer,
        correct=group.is_correct(grade),
    )


def shown_texts(candidates: list[Candidate]) -> list[str]:
    texts = [c.shown for c in candidates if c.shown is not None]
    assert len(texts) == len(candidates), "a prompt was built before its candidates were prepared"
    return texts


def merged(candidates: list[Candidate]) -> list[Candidate]:
    """Near-duplicates as one candidate with a count, in the order of first appearance (ours, not
    the paper's).

    Two candidates are near-duplicates if they come from the same side, end in the same answer and
    share at least `NEAR` of their words, counted with repeats over the longer text.
    """
    kept: list[Candidate] = []
    for one in candidates:
        twin = next((other for other in kept if _near(one, other)), None)
        if twin is None:
            kept.append(one)
        else:
            twin.count += 1
    return kept


NEAR = 0.8


def _near(one: Candidate, other: Candidate) -> bool:
    if (one.source, one.correct, one.answer) != (other.source, other.correct, other.answer):
        return False
    mine, others = Counter(one.text.split()), Counter(other.text.split())
    longer = max(mine.total(), others.total())
    return (mine & others).total() >= NEAR * longer


def _drawn_trace(visit: Visit, rng: random.Random) -> Candidate:
    assert visit.teacher is not None
    return candidate("teacher", visit.teacher, rng.choice(_correct_teacher(visit)))


def _correct_teacher(visit: Visit) -> list[int]:
    return visit.teacher.indices(correct=True) if visit.teacher is not None else []
