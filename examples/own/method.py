"""A method in one file: GRPO with replay, and hard questions once more behind a wrong response.

A reformulation says which visits it wants, which responses its prompt shows, and what the prompt
is. Named in a topology by `method: {name: ./method.py:METHOD}`; `docs/extending.md` has the rest.
"""

from __future__ import annotations

import random

import msgspec

from zppo.algorithm.methods import Method
from zppo.algorithm.reformulations import Preparation, candidate
from zppo.algorithm.window import Candidate, Visit
from zppo.prompting.prompts import PromptSet
from zppo_protocol.values import Prompt


class SecondLook:
    """The question with one of the student's own wrong responses behind it."""

    kind = "second_look"
    preparation: Preparation = "none"  # shown as it is; "compress" lets the teacher shorten it

    def admits(self, visit: Visit) -> bool:
        return bool(visit.plain.found_wrong())

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return [candidate("student", visit.plain, rng.choice(visit.plain.found_wrong()))]

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        plain = prompts.plain(visit.question)
        *before, last = plain.messages
        text = f"{last.content}\n{candidates[0].shown}"
        messages = [*before, msgspec.structs.replace(last, content=text)]
        return msgspec.structs.replace(plain, messages=messages)


METHOD = Method(
    name="second_look",
    title="Second look",
    summary="plain prompts, and hard questions behind a wrong response",
    replay=True,
    reformulations=(SecondLook(),),
)
