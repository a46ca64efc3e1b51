"""The corpora of the picture world: prompts as templates render them, answers as beliefs print
them.

The student learns plain, BCQ and NCQ prompts, so that it can read candidates before RL, the teacher
plain ones. Invariant: no target is drawn from the truth but what a belief says of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from picture_world import (
    ANSWERS,
    Belief,
    Fact,
    Pixels,
    Thing,
    answer_text,
    believed,
    draw,
    draw_things,
    facts_of,
    question_text,
)

MAX_NEGATIVES = 4
BCQ_COPY = 0.6
NOISE = 0.5


class Example(NamedTuple):
    picture: Pixels
    prompt: str
    answer: str


class Corpus:
    """Draws examples of each shape from one belief, about pictures of its own."""

    def __init__(self, belief: Belief, templates: Path, rng: np.random.Generator) -> None:
        self._belief = belief
        self._rng = rng
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(templates),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates = {
            name: environment.get_template(f"{name}.j2") for name in ("plain", "bcq", "ncq")
        }

    def draw(self, shape: str, count: int, kinds: Sequence[str]) -> list[Example]:
        """``count`` examples of ``plain``, ``bcq`` or ``ncq``, about ``kinds`` in turn."""
        make = {"plain": self._plain, "bcq": self._bcq, "ncq": self._ncq}[shape]
        return [make(draw(things), fact) for things, fact in self._asked(count, kinds)]

    def _asked(self, count: int, kinds: Sequence[str]) -> Iterator[tuple[list[Thing], Fact]]:
        """Kinds are drawn before facts, because a picture has more to count than to read."""
        for number in range(count):
            kind = kinds[number % len(kinds)]
            facts: list[Fact] = []
            while not facts:
                things = draw_things(self._rng)
                facts = [fact for fact in facts_of(things) if fact.kind == kind]
            yield things, facts[self._rng.integers(len(facts))]

    def _render(self, name: str, fact: Fact, **variables: object) -> str:
        return self._templates[name].render(question=question_text(fact), **variables)

    def _noisy(self, fact: Fact, noise: float) -> str:
        if self._rng.random() < noise:
            return str(self._rng.choice(ANSWERS[fact.kind]))
        return believed(self._belief, fact, self._rng)

    def _plain(self, picture: Pixels, fact: Fact) -> Example:
        answer = believed(self._belief, fact, self._rng)
        return Example(picture, self._render("plain", fact), answer_text(fact, answer))

    def _bcq(self, picture: Pixels, fact: Fact) -> Example:
        """Two candidates with different answers; the target copies one of them, by coin, or is the
        belief's own."""
        first = second = self._noisy(fact, NOISE)
        while second == first:
            second = self._noisy(fact, 1.0)
        pair = [first, second] if self._rng.random() < 0.5 else [second, first]
        copied = self._rng.random() < BCQ_COPY
        answer = pair[self._rng.integers(2)] if copied else believed(self._belief, fact, self._rng)
        shown = [answer_text(fact, one) for one in pair]
        prompt = self._render("bcq", fact, candidates=shown)
        return Example(picture, prompt, answer_text(fact, answer))

    def _ncq(self, picture: Pixels, fact: Fact) -> Example:
        """One to four wrong candidates; the target is what the belief says given that."""
        options = len(ANSWERS[fact.kind])
        shown = int(self._rng.integers(1, min(MAX_NEGATIVES, options - 1) + 1))
        wrong = [self._noisy(fact, NOISE) for _ in range(shown)]
        left = [one for one in ANSWERS[fact.kind] if one not in wrong]
        answers, shares = self._belief[fact]
        allowed = [(one, share) for one, share in zip(answers, shares, strict=True) if one in left]
        total = sum(share for _, share in allowed)
        answer = str(
            self._rng.choice([one for one, _ in allowed], p=[share / total for _, share in allowed])
            if total > 0
            else self._rng.choice(left)
        )
        candidates = [answer_text(fact, one) for one in wrong]
        prompt = self._render(
            "ncq", fact, candidates=candidates, wrong_answers=list(dict.fromkeys(wrong))
        )
        return Example(picture, prompt, answer_text(fact, answer))
