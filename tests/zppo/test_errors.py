"""What every command shares: words of others, as a terminal may be given them."""

from __future__ import annotations

import pytest

from zppo.errors import UserError, count_of, printable

HARMLESS = (
    "plain words, and two\nlines",
    "10\u00a0000\u202f€, a\u2009thin one",  # blanks that do not break a line
    "三\u3000四",
    "a\ttab",
    "\U0001f469\u200d\U0001f52c",  # one emoji of two
    "می\u200cخواهم",
)


def test_one_is_one_and_others_are_several() -> None:
    assert [count_of(n, "row") for n in (0, 1, 2, 1234)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "1,234 rows",
    ]
    assert count_of(1, "question is", "questions are") == "1 question is"
    assert count_of(2, "question is", "questions are") == "2 questions are"


@pytest.mark.parametrize("text", HARMLESS)
def test_words_stay_as_they_are(text: str) -> None:
    assert printable(text) == str(UserError(text)) == text


@pytest.mark.parametrize(
    ("hostile", "spelled"),
    [
        ("\x1b]0;mine\x07", r"\x1b]0;mine\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("100 %\rnothing", r"100 %\rnothing"),
        ("a\x0bb\x0cc\x85d\u2028e", r"a\x0bb\x0cc\x85d\u2028e"),
        ("\u202eterces", r"\u202eterces"),
        ("\u2066x\u200b\ufeff", r"\u2066x\u200b\ufeff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_steers_a_terminal_is_spelled_out(hostile: str, spelled: str) -> None:
    assert printable(f"\u00a0{hostile}") == f"\u00a0{spelled}"
