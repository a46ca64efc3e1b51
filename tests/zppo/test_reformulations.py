"""BCQ and NCQ: who is shown, in which order, and that nothing gives the right one away."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from worlds import PROMPTS

from zppo.questions import Question
from zppo.reformulations import BinaryCandidateIncluded, NegativeCandidateIncluded
from zppo.window import Group, Visit
from zppo_protocol.messages import Grade, GroupSamples


def group(kind: str, answers: list[tuple[float, str | None]]) -> Group:
    question = Question(id="q", text="what?", answer="1")
    n = len(answers)
    if n == 0:  # the teacher could not be asked
        return Group(id=f"0/q/{kind}", kind=kind, prompt=PROMPTS.plain(question), grades=[])
    samples = GroupSamples(
        prompt_ids=np.array([1], np.int32),
        token_ids=np.zeros(n, np.int32),
        log_probs=np.zeros(n, np.float32),
        offsets=np.arange(n + 1, dtype=np.int32),
        version_spans=np.array([[n, 0]], np.int32),
        texts=[f"{kind} {i}: \\boxed{{{answer}}}" for i, (_, answer) in enumerate(answers)],
        finish_reasons=["stop"] * n,
    )
    grades = [Grade(reward=reward, answer=answer) for reward, answer in answers]
    return Group(id=f"0/q/{kind}", kind=kind, prompt=PROMPTS.plain(question), samples=samples, grades=grades)


def visit(plain: list[tuple[float, str | None]], teacher: list[tuple[float, str | None]] | None) -> Visit:
    return Visit(
        question=Question(id="q", text="what?", answer="1"),
        origin="new",
        plain=group("plain", plain),
        teacher=group("teacher", teacher) if teacher is not None else None,
    )


@pytest.mark.parametrize(
    ("plain", "teacher", "bcq", "ncq"),
    [
        ([(0.0, "2"), (1.0, "1")], [(1.0, "1")], True, True),
        ([(0.0, "2")], [(0.0, "3")], False, True),
        ([(0.0, "2")], None, False, True),
        ([(0.0, "2")], [], False, True),
        ([(1.0, "1")], [(1.0, "1")], False, False),
    ],
)
def test_which_visits_admit_which_reformulation(
    plain: list[tuple[float, str | None]], teacher: list[tuple[float, str | None]] | None, bcq: bool, ncq: bool
) -> None:
    seen = visit(plain, teacher)
    assert BinaryCandidateIncluded().admits(seen) == bcq
    assert NegativeCandidateIncluded().admits(seen) == ncq


def test_bcq_draws_uniformly_and_its_order_tells_nothing() -> None:
    seen = visit([(0.0, "2"), (1.0, "1"), (0.0, "3")], [(1.0, "1"), (0.0, "9"), (1.0, "1")])
    drawn = [BinaryCandidateIncluded().draw(seen, random.Random(i)) for i in range(2000)]
    places = Counter((c.source, c.index, place) for pair in drawn for place, c in enumerate(pair))
    assert set(places) == {(s, i, p) for s in ("student", "teacher") for i in (0, 2) for p in (0, 1)}
    assert all(430 < count < 570 for count in places.values()), "each of 8 places is taken 500 times of 2000"
    assert all({c.correct for c in pair} == {True, False} for pair in drawn)


def test_ncq_shows_every_wrong_response_and_lists_each_answer_once() -> None:
    seen = visit([(0.0, "2"), (1.0, "1"), (0.0, "3"), (0.0, "2"), (0.0, None)], None)
    shown = NegativeCandidateIncluded().draw(seen, random.Random(0))
    assert [c.index for c in shown] == [0, 2, 3, 4]
    for c in shown:
        c.compressed = f"short {c.index}"
    text = NegativeCandidateIncluded().prompt(seen, shown, PROMPTS).messages[-1].content
    assert text.count("\\boxed{2}") == 1 and text.count("\\boxed{3}") == 1
    assert all(f"short {i}" in text for i in (0, 2, 3, 4))


def test_nothing_in_the_bcq_prompt_but_the_text_differs_between_right_and_wrong() -> None:
    seen = visit([(0.0, "2")], [(1.0, "1")])
    shown = BinaryCandidateIncluded().draw(seen, random.Random(0))
    for c in shown:
        c.compressed = "RIGHT" if c.correct else "WRONG"
    text = BinaryCandidateIncluded().prompt(seen, shown, PROMPTS).messages[-1].content
    reverse = BinaryCandidateIncluded().prompt(seen, shown[::-1], PROMPTS).messages[-1].content
    assert text.replace("RIGHT", "X").replace("WRONG", "RIGHT").replace("X", "WRONG") == reverse
