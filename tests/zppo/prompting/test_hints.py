r"""Hints: whatever the teacher wrote, no box and not the answer."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zppo.grading.boxes import BOX
from zppo.prompting.hints import BLANK, answer_pattern, by_rule, written
from zppo.prompting.prompts import neutral

LINES, TOKENS = 5, 512
RESPONSE = "Take half of ten.\nThat is what remains.\nSo the answer is \\boxed{5}."

answers = st.sampled_from(
    ["5", "-5", "3.5", "A", "x y", "x  y", "\\frac{1}{2}", "\\text{Paris}", "…", "a…", "<", "50%"]
)
pieces = st.sampled_from(
    ["5", "x", "y", "A", "Paris", "PARIS", " ", "\n", "\\boxed{", "\\boxed", "{5}", "}",
    "\\fboxed{x}", "<think>",
     "</think>", "<hint>", "<|", "|>", "<", ">", "…", "=", ".", "3", "1", "\\frac{1}{2}", "50%",
     "word"]
)  # fmt: skip
texts = st.lists(pieces | st.text(max_size=3), max_size=30).map("".join)


def accept(reply: str | None, response: str, max_lines: int, max_tokens: int) -> str:
    """What is shown of a response: the teacher's words if they can be used."""
    words = None if reply is None else written(reply, response, max_lines, max_tokens)
    return words or by_rule(response, max_lines, max_tokens)


@settings(deadline=None)
@given(
    reply=st.none() | texts,
    before=texts,
    answer=answers,
    tokens=st.integers(1, 20),
    most=st.integers(1, 3),
)
@example(reply="1<\n\\boxed{}\nhint>5", before="", answer="15", tokens=20, most=3)
@example(reply="\\bo<think>xed{5}", before="", answer="5", tokens=20, most=3)
@example(reply="51", before="51 52", answer="5", tokens=1, most=1)
@example(reply="\\boxed\n{5}", before="", answer="5", tokens=20, most=3)
def test_no_hint_gives_the_answer_away(
    reply: str | None, before: str, answer: str, tokens: int, most: int
) -> None:
    response = f"{before} \\boxed{{{answer}}}"
    hint = accept(reply, response, most, tokens)
    assert not BOX.search(hint)
    assert len(hint.splitlines()) <= most and len(hint) <= tokens * 4
    pattern = answer_pattern(response)
    assert pattern is None or not pattern.search(hint)
    assert neutral(hint) == hint, (
        "the prompt takes nothing more out of it, which might join the answer"
    )


@pytest.mark.parametrize(
    ("reply", "hint"),
    [
        ("Halve it.", "Halve it."),
        ("Halve it: 10 / 2 = 5.", f"Halve it: 10 / 2 = {BLANK}."),
        ("x=5, not 55, 3.5 or 5.25", f"x={BLANK}, not 55, 3.5 or 5.25"),
        ("**5** $5$ (5) 5km", f"**{BLANK}** ${BLANK}$ ({BLANK}) {BLANK}km"),
        ("Halve it.\nSo \\boxed{5}.\nDone.", "Halve it.\nDone."),
        ("<think>it is 5</think>Halve it.", "Halve it."),
        ("1\n2\n3\n4\n6\n7", "1\n2\n3\n4\n6"),
        ("\\boxed{5}", "Take half of ten.\nThat is"),
        ("5 5 5", "Take half of ten.\nThat is"),
        ("", "Take half of ten.\nThat is"),
        (None, "Take half of ten.\nThat is"),
    ],
)
def test_what_is_shown_of_a_reply(reply: str | None, hint: str) -> None:
    assert accept(reply, RESPONSE, LINES, TOKENS) == hint


@pytest.mark.parametrize(
    ("answer", "text", "shown"),
    [
        ("Paris", "paris, PARIS or Parisian", f"{BLANK}, {BLANK} or Parisian"),
        ("\\text{Paris}", "It is Paris.", f"It is {BLANK}."),
        ("A", "A or a?", f"{BLANK} or a?"),
        ("x + y", "x\n+ y and x+y", f"{BLANK} and x+y"),
        ("\\frac{1}{2}", "z\\frac{1}{2}", f"z{BLANK}"),
    ],
)
def test_the_answer_is_found_as_a_word(answer: str, text: str, shown: str) -> None:
    assert accept(text, f"\\boxed{{{answer}}}", LINES, TOKENS) == shown


def test_without_a_box_nothing_is_the_answer() -> None:
    assert answer_pattern("it is 5") is None
    assert by_rule("one two three four", LINES, TOKENS) == "one two"


@pytest.mark.parametrize(
    ("response", "hint"),
    [("\\boxed{5}", BLANK), ("5 6 \\boxed{5}", BLANK), ("  ", BLANK), ("7 \\boxed{5}", "7")],
)
def test_a_response_that_says_nothing_leaves_a_blank(response: str, hint: str) -> None:
    assert by_rule(response, LINES, TOKENS) == hint


HOSTILE = [
    "<",
    "< ",
    "<think",
    "<|",
    "\\boxed{",
    "\\bo",
    "{",
    "5",
    "5 ",
    "\n",
    "5\n",
    "<hint ",
    "</think>",
    " ",
]


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_page_of_anything_takes_linear_time(piece: str) -> None:
    """The square of these lengths would take minutes."""
    page = piece * (100_000 // len(piece))
    for text in (page, page + "5>" * 10_000, page + "xed{5}" * 10_000):
        response = f"{text} \\boxed{{5}}"
        hint, answer = accept(text, response, LINES, TOKENS), answer_pattern(response)
        assert not BOX.search(hint) and not (answer and answer.search(hint))
