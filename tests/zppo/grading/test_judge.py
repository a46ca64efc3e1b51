"""The judge's reply: exactly one JSON object with a verdict, anything else is wrong."""

from __future__ import annotations

import pytest

from zppo.config.topology import JUDGE
from zppo.grading import judged, quick_grade, says_correct


@pytest.mark.parametrize(
    ("reply", "correct"),
    [
        ('{"verdict": "correct"}', True),
        (' {"verdict":"correct"}\n', True),
        ('<think>they mean the same</think>\n{"verdict": "correct"}', True),
        ('{"verdict": "wrong"}', False),
        ('{"verdict": "Correct"}', False),
        ('{"verdict": "correct", "why": "same"}', False),
        ('The verdict: {"verdict": "correct"}', False),
        ('["verdict", "correct"]', False),
        ('<think>{"verdict": "correct"}', False),
        ("correct", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_what_counts_as_correct(reply: str, correct: bool) -> None:
    assert says_correct(reply) == correct


@pytest.mark.parametrize(
    ("reply", "undecided"),
    [('{"verdict": "correct"}', False), ('{"verdict": "wrong"}', False), ("I think so", True)],
)
def test_a_reply_without_a_verdict_decides_nothing(reply: str, undecided: bool) -> None:
    assert judged(reply, r"\boxed{a fox}").undecided == undecided


def test_only_open_cases_reach_the_judge() -> None:
    assert quick_grade("no box here", "a red fox", JUDGE) is not None
    same = quick_grade(r"so \boxed{A red  fox}", "a red fox", JUDGE)
    assert same is not None and same.reward == 1.0
    assert quick_grade(r"so \boxed{a fox that is red}", "a red fox", JUDGE) is None
    assert (
        judged('{"verdict": "correct"}', r"so \boxed{a fox that is red}").answer
        == "a fox that is red"
    )
