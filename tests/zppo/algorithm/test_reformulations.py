"""BCQ, NCQ, Hint and Prefix: who is shown, in which order, and that nothing gives the right one
away."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from msgspec import structs
from worlds import PROMPTS, topology

from zppo.algorithm.methods import get_method
from zppo.algorithm.reformulations import (
    BinaryCandidateIncluded,
    Hint,
    NegativeCandidateIncluded,
    Prefix,
    merged,
)
from zppo.algorithm.steps import Recipe, counted
from zppo.algorithm.window import Candidate, Group, Visit
from zppo.data.question import Question
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import TIMED_OUT, Grade


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
    return Group(
        id=f"0/q/{kind}", kind=kind, prompt=PROMPTS.plain(question), samples=samples, grades=grades
    )


def visit(
    plain: list[tuple[float, str | None]], teacher: list[tuple[float, str | None]] | None
) -> Visit:
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
    plain: list[tuple[float, str | None]],
    teacher: list[tuple[float, str | None]] | None,
    bcq: bool,
    ncq: bool,
) -> None:
    seen = visit(plain, teacher)
    assert BinaryCandidateIncluded().admits(seen) == bcq
    assert NegativeCandidateIncluded().admits(seen) == ncq


def graded(*grades: Grade) -> Visit:
    """A visit with these grades and a correct teacher response."""
    seen = visit([(grade.reward, grade.answer) for grade in grades], [(1.0, "1")])
    seen.plain.grades = list(grades)
    return seen


def test_what_may_be_right_is_never_shown_as_wrong() -> None:
    timed_out = Grade(reward=0.0, answer="1", note=TIMED_OUT, undecided=True)
    seen = graded(timed_out, Grade(reward=0.0, answer="2"), Grade(reward=1.0, answer="1"))
    assert seen.accuracy == 1 / 3, "it counts as wrong all the same"
    assert [c.index for c in NegativeCandidateIncluded().draw(seen, random.Random(0))] == [1]
    for i in range(20):
        pair = BinaryCandidateIncluded().draw(seen, random.Random(i))
        assert {(c.source, c.index) for c in pair} == {("student", 1), ("teacher", 0)}
    alone = graded(timed_out, Grade(reward=1.0, answer="1"))
    assert not BinaryCandidateIncluded().admits(alone)
    assert not NegativeCandidateIncluded().admits(alone)


def test_a_right_answer_that_was_cut_off_earns_nothing_and_is_not_shown_as_wrong() -> None:
    config = topology(method={"name": "zppo", "truncated": "zero"})
    seen = graded(*(Grade(reward=reward, answer="1") for reward in (1.0, 0.0, 1.0)))
    plain = seen.plain
    plain.samples = structs.replace(plain.the_samples, finish_reasons=["length", "length", "stop"])
    plain.grades = counted(plain, plain.the_grades, Recipe.of(config, get_method("zppo")))
    assert plain.rewards.tolist() == [0.0, 0.0, 1.0]
    assert plain.found_wrong() == [1], "cut off, and wrong as far as it goes"


def test_bcq_draws_uniformly_and_its_order_tells_nothing() -> None:
    seen = visit([(0.0, "2"), (1.0, "1"), (0.0, "3")], [(1.0, "1"), (0.0, "9"), (1.0, "1")])
    drawn = [BinaryCandidateIncluded().draw(seen, random.Random(i)) for i in range(2000)]
    places = Counter((c.source, c.index, place) for pair in drawn for place, c in enumerate(pair))
    assert set(places) == {
        (s, i, p) for s in ("student", "teacher") for i in (0, 2) for p in (0, 1)
    }
    assert all(430 < count < 570 for count in places.values()), (
        "each of 8 places is taken 500 times of 2000"
    )
    assert all({c.correct for c in pair} == {True, False} for pair in drawn)


def test_ncq_shows_every_wrong_response_and_lists_each_answer_once() -> None:
    seen = visit([(0.0, "2"), (1.0, "1"), (0.0, "3"), (0.0, "2"), (0.0, None)], None)
    shown = NegativeCandidateIncluded().draw(seen, random.Random(0))
    assert [c.index for c in shown] == [0, 2, 3, 4]
    for c in shown:
        c.shown = f"short {c.index}"
    text = NegativeCandidateIncluded().prompt(seen, shown, PROMPTS).messages[-1].content
    assert text.count("\\boxed{2}") == 1 and text.count("\\boxed{3}") == 1
    assert all(f"short {i}" in text for i in (0, 2, 3, 4))


def test_nothing_in_the_bcq_prompt_but_the_text_differs_between_right_and_wrong() -> None:
    seen = visit([(0.0, "2")], [(1.0, "1")])
    shown = BinaryCandidateIncluded().draw(seen, random.Random(0))
    for c in shown:
        c.shown = "RIGHT" if c.correct else "WRONG"
    text = BinaryCandidateIncluded().prompt(seen, shown, PROMPTS).messages[-1].content
    reverse = BinaryCandidateIncluded().prompt(seen, shown[::-1], PROMPTS).messages[-1].content
    assert text.replace("RIGHT", "X").replace("WRONG", "RIGHT").replace("X", "WRONG") == reverse


@pytest.mark.parametrize("reformulator", [Hint(), Prefix()])
def test_hint_and_prefix_are_made_from_one_correct_teacher_response(
    reformulator: Hint | Prefix,
) -> None:
    seen = visit([(0.0, "2"), (1.0, "1")], [(0.0, "9"), (1.0, "1"), (1.0, "1")])
    assert reformulator.admits(seen)
    drawn = Counter(
        (c.source, c.index) for i in range(600) for c in reformulator.draw(seen, random.Random(i))
    )
    assert set(drawn) == {("teacher", 1), ("teacher", 2)} and min(drawn.values()) > 240, "uniformly"
    for teacher in ([(0.0, "9")], [], None):
        assert not reformulator.admits(visit([(0.0, "2")], teacher))


def test_a_right_plain_group_admits_a_hint_all_the_same() -> None:
    """Whether the question is hard is not asked here."""
    assert Hint().admits(visit([(1.0, "1")], [(1.0, "1")]))


def test_the_hint_is_what_is_shown_of_the_response() -> None:
    seen = visit([(0.0, "2")], [(1.0, "1")])
    [trace] = Hint().draw(seen, random.Random(0))
    trace.shown = "Count on your fingers."
    text = Hint().prompt(seen, [trace], PROMPTS).messages[-1].content
    assert "<hint>\nCount on your fingers.\n</hint>" in text and trace.text not in text


def test_the_prefix_is_the_response_itself() -> None:
    seen = visit([(0.0, "2")], [(1.0, "1")])
    [trace] = Prefix().draw(seen, random.Random(0))
    trace.shown = trace.text
    prompt = Prefix().prompt(seen, [trace], PROMPTS)
    assert prompt.start is not None and (prompt.start.text, prompt.start.share) == (trace.text, 0.4)
    assert prompt.messages == PROMPTS.plain(seen.question).messages


def said(*texts: str, answer: str | None = "2", source: str = "student") -> list[Candidate]:
    return [
        Candidate(
            source="teacher" if source == "teacher" else "student",
            index=i,
            text=t,
            answer=answer,
            correct=False,
        )
        for i, t in enumerate(texts)
    ]


FIVE = "one two three four five"


@pytest.mark.parametrize(
    ("other", "near"),
    [
        (FIVE, True),
        ("five four three two one", True),
        ("one two three four six", True),  # 4 of 5
        ("one two three six seven", False),
        (f"{FIVE} six", True),  # 5 of 6
        (f"{FIVE} six seven", False),  # 5 of 7
        ("one one one one one", False),
        ("", False),
    ],
)
def test_near_duplicates_share_four_words_of_five(other: str, near: bool) -> None:
    for pair in (said(FIVE, other), said(other, FIVE)):
        kept = merged(pair)
        assert [c.count for c in kept] == ([2] if near else [1, 1])
        assert kept[0].text == pair[0].text, "the first stays"


def test_candidates_that_end_otherwise_or_come_from_elsewhere_stay_apart() -> None:
    different = [
        *said(FIVE),
        *said(FIVE, answer="3"),
        *said(FIVE, answer=None),
        *said(FIVE, source="teacher"),
    ]
    assert merged(different) == different and all(c.count == 1 for c in different)


def test_many_near_duplicates_are_counted_with_the_first() -> None:
    kept = merged(said(FIVE, "something else", FIVE, f"{FIVE} six", "something else", FIVE))
    assert [(c.index, c.count) for c in kept] == [(0, 4), (1, 2)]


def test_a_merged_ncq_lists_every_answer_and_says_how_often() -> None:
    seen = visit([(0.0, "2"), (0.0, "2"), (0.0, "3")], None)
    assert seen.plain.samples is not None
    seen.plain.samples.texts[1] = seen.plain.samples.texts[0]
    shown = merged(NegativeCandidateIncluded().draw(seen, random.Random(0)))
    for c in shown:
        c.shown = f"short {c.index}"
    text = NegativeCandidateIncluded().prompt(seen, shown, PROMPTS).messages[-1].content
    assert "short 0\n</candidate>\n(2 attempts went like this.)" in text and "short 1" not in text
    assert text.count("\\boxed{2}") == text.count("\\boxed{3}") == 1 and "(1 attempts" not in text
