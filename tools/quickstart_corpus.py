"""The pre-training corpora of the quickstart: prompts as the templates render them, answers as a
belief prints them.

The student learns plain, BCQ and NCQ prompts, so that it can read candidates before RL; the teacher
plain and compress. Invariant: no shape tells the student more than its belief does; nothing here is
drawn from the truth.

- plain: the answer is a chain drawn from the belief.
- BCQ: two chains with different answers; the target copies one of them (either, by coin) or ignores
  both.
- NCQ: one to eight chains, mostly the belief's own; the target is the belief's answer given that
  those are wrong.
- compress: any chain, right or wrong; the target is its values and its final answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from quickstart_world import (
    Floats,
    Ints,
    answer_text,
    compressed_text,
    draw_chains,
    draw_factors,
    factor_key,
    final_values,
    question_text,
)

NOISE = 0.5
WRONG_NOISE = 0.2
BCQ_COPY = 0.6
MAX_NEGATIVES = 8
OWN_TRIES = 48


class Example(NamedTuple):
    """One line of a corpus: the user message and the assistant's answer."""

    prompt: str
    answer: str


class Corpus:
    """Draws examples of each shape from one belief, never about a held-out question."""

    def __init__(
        self, belief_VVV: Floats, templates: Path, held_out: Ints, rng: np.random.Generator
    ) -> None:
        self._belief_VVV = belief_VVV
        self._held_out_keys = factor_key(held_out)
        self._rng = rng
        self._templates = load_templates(templates)
        self._shapes: dict[str, Callable[[int], list[Example]]] = {
            "plain": self._plain,
            "bcq": self._bcq,
            "ncq": self._ncq,
            "compress": self._compress,
        }

    def draw(self, shape: str, count: int) -> list[Example]:
        """``count`` examples of ``plain``, ``bcq``, ``ncq`` or ``compress``."""
        return self._shapes[shape](count)

    def _factors(self, count: int) -> Ints:
        factors_BF = draw_factors(2 * count + 16, self._rng)
        return factors_BF[~np.isin(factor_key(factors_BF), self._held_out_keys)][:count]

    def _chains(self, factors_BF: Ints, noise: float = 0.0) -> Ints:
        return draw_chains(factors_BF, self._belief_VVV, self._rng, noise)

    def _render(self, name: str, factors_F: Ints, **variables: object) -> str:
        return self._templates[name].render(question=question_text(factors_F), **variables)

    def _plain(self, count: int) -> list[Example]:
        factors_BF = self._factors(count)
        chains_BS = self._chains(factors_BF)
        return [
            Example(self._render("plain", f), answer_text(f, c))
            for f, c in zip(factors_BF, chains_BS, strict=True)
        ]

    def _bcq(self, count: int) -> list[Example]:
        factors_BF = self._factors(2 * count)
        own, first, second = (self._chains(factors_BF, noise) for noise in (0.0, NOISE, NOISE))
        differ = final_values(factors_BF, first) != final_values(factors_BF, second)
        rows = np.flatnonzero(differ)[:count]
        return [self._bcq_example(factors_BF[r], own[r], [first[r], second[r]]) for r in rows]

    def _bcq_example(self, factors_F: Ints, own_S: Ints, pair: list[Ints]) -> Example:
        target_S = pair[self._rng.integers(2)] if self._rng.random() < BCQ_COPY else own_S
        prompt = self._render("bcq", factors_F, candidates=[compressed_text(c) for c in pair])
        return Example(prompt, answer_text(factors_F, target_S))

    def _ncq(self, count: int) -> list[Example]:
        factors_BF = self._factors(2 * count)
        own_KBS = [self._chains(factors_BF) for _ in range(OWN_TRIES)]
        wrong_NBS = [self._chains(factors_BF, WRONG_NOISE) for _ in range(MAX_NEGATIVES)]
        finals_KB, finals_NB = (
            np.stack([final_values(factors_BF, c) for c in chains])
            for chains in (own_KBS, wrong_NBS)
        )
        examples: list[Example] = []
        for row, factors_F in enumerate(factors_BF):
            shown = int(self._rng.integers(1, MAX_NEGATIVES + 1))
            allowed = np.flatnonzero(~np.isin(finals_KB[:, row], finals_NB[:shown, row]))
            if allowed.size:
                wrong_NS = [chains_BS[row] for chains_BS in wrong_NBS[:shown]]
                examples.append(self._ncq_example(factors_F, own_KBS[allowed[0]][row], wrong_NS))
        return examples[:count]

    def _ncq_example(self, factors_F: Ints, own_S: Ints, wrong_NS: list[Ints]) -> Example:
        finals = list(dict.fromkeys(str(chain_S[chain_S > 0][-1]) for chain_S in wrong_NS))
        candidates = [compressed_text(chain_S) for chain_S in wrong_NS]
        prompt = self._render("ncq", factors_F, candidates=candidates, wrong_answers=finals)
        return Example(prompt, answer_text(factors_F, own_S))

    def _compress(self, count: int) -> list[Example]:
        factors_BF = self._factors(count)
        chains_BS = self._chains(factors_BF, 1.0)
        return [self._compress_example(f, c) for f, c in zip(factors_BF, chains_BS, strict=True)]

    def _compress_example(self, factors_F: Ints, chain_S: Ints) -> Example:
        response = answer_text(factors_F, chain_S)
        prompt = self._render("compress", factors_F, response=response, max_tokens=32, max_lines=1)
        return Example(prompt, compressed_text(chain_S))


def load_templates(folder: Path) -> dict[str, jinja2.Template]:
    """The four templates by name (``plain``, ``bcq``, ``ncq``, ``compress``), rendered as the
    actors render them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return {
        name: environment.get_template(f"{name}.j2") for name in ("plain", "bcq", "ncq", "compress")
    }
