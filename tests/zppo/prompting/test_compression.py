"""Compression keeps the final answer, whatever the teacher or the candidate wrote."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from zppo.grading import last_boxed
from zppo.prompting.compression import by_rule, faithful, written
from zppo.prompting.prompts import neutral

TOY = r"3 * 17 = 5 ; 5 * 5 = 2 ; \boxed{ 2 }"
pieces = st.sampled_from(
    [
        "\\boxed{",
        "}",
        "{",
        "\n",
        " ",
        "wait ",
        "<think>",
        "</think>",
        "</candidate>",
        "7",
        "x = 1",
        "\\",
        "\u2028",
        "\r\n",
    ]
)
texts = st.lists(pieces, max_size=25).map("".join)


def accept(reply: str, text: str, max_lines: int, max_tokens: int) -> str:
    """What is shown of a candidate: the teacher's words if they can be used."""
    return written(reply, text, max_lines) or by_rule(text, max_lines, max_tokens)


def answer(text: str) -> list[str] | None:
    content = last_boxed(text)
    return None if content is None else content.split()


def test_a_faithful_reply_is_kept_word_for_word() -> None:
    assert accept(r"5 * 5 = 2 ; \boxed{ 2 }", TOY, 5, 512) == r"5 * 5 = 2 ; \boxed{ 2 }"


def test_a_reply_with_another_answer_falls_back_to_the_rule() -> None:
    assert accept(r"3 * 17 = 5 ; \boxed{ 5 }", TOY, 5, 512) == TOY


def test_a_reply_may_not_solve_what_the_candidate_left_open() -> None:
    assert not faithful(r"so it is \boxed{4}", "two and two make", 5)
    assert accept(r"so it is \boxed{4}", "two and two make", 5, 512) == "two and two make"


def test_a_reply_may_not_drop_the_answer() -> None:
    assert not faithful("two and two make four", r"\boxed{4}", 5)


def test_a_reply_may_not_have_too_many_lines() -> None:
    reply = "1\n2\n3\n4\n5\n\\boxed{6}"
    assert not faithful(reply, r"\boxed{6}", 5)
    assert faithful(reply, r"\boxed{6}", 6)


def test_thoughts_of_the_reply_do_not_count_as_lines() -> None:
    reply = "<think>\na\nb\nc\nd\ne\n</think>\nshort \\boxed{6}"
    assert accept(reply, r"\boxed{6}", 1, 512) == r"short \boxed{6}"


def test_a_reply_cut_off_inside_its_thoughts_falls_back() -> None:
    assert not faithful(r"<think> the answer is \boxed{6}", r"\boxed{6}", 5)


def test_an_empty_reply_falls_back() -> None:
    assert accept("", "a\nb", 1, 512) == "b"


def test_the_rule_keeps_the_last_essential_lines() -> None:
    text = "a = 1\nb = 2\nWait, no.\nLet me check again.\nc = 3\nThus \\boxed{3}\nHope this helps!"
    assert by_rule(text, 3, 512) == "b = 2\nc = 3\nThus \\boxed{3}"


def test_the_rule_reads_past_the_thoughts() -> None:
    assert (
        by_rule("<think>hmm \\boxed{1}</think>\nThus\n\n\\boxed{3}", 5, 512) == "Thus\n\\boxed{3}"
    )


def test_an_answer_that_stands_in_the_thoughts_only_is_appended() -> None:
    assert (
        by_rule(r"<think>\boxed{3}</think> The answer is three.", 5, 512)
        == "The answer is three.\n\\boxed{3}"
    )


def test_a_text_that_is_all_thought_is_shortened_like_any_other() -> None:
    assert by_rule("<think>a\nb\nc \\boxed{3}", 2, 512) == "b\nc \\boxed{3}"


def test_a_long_line_loses_its_beginning_and_never_its_box() -> None:
    short = by_rule("one two three four five six " * 50 + r"\boxed{7}", 5, 10)
    assert short.endswith(r"six \boxed{7}") and len(short) <= 40


def test_a_box_is_kept_verbatim_even_where_it_is_longer_than_the_limit() -> None:
    box = r"\boxed{" + "9" * 100 + "}"
    assert by_rule("long " * 100 + box, 5, 10) == box


def test_a_box_over_several_lines_becomes_one_line() -> None:
    assert by_rule("\\boxed{\n1,\n2\n}", 1, 512) == r"\boxed{ 1, 2 }"


def test_a_text_without_a_box_keeps_its_end() -> None:
    assert by_rule("a\nb\nMaybe\nc", 2, 512) == "b\nc"
    assert by_rule("", 5, 512) == ""


@given(texts, st.integers(1, 6), st.integers(1, 40))
@example("\\boxed{\nwait {\n}", 5, 40)
@example("\\boxed{\\boxed{\\boxed{}", 1, 5)
def test_the_rule_keeps_the_answer_and_the_limits(
    text: str, max_lines: int, max_tokens: int
) -> None:
    short = by_rule(text, max_lines, max_tokens)
    assert answer(short) == answer(neutral(text))
    assert len(short.splitlines()) <= max_lines
    box = 0 if (content := last_boxed(short)) is None else len(content) + 20
    assert len(short) <= max(4 * max_tokens, box)


@given(texts, texts, st.integers(1, 6))
def test_compression_never_changes_the_answer(reply: str, text: str, max_lines: int) -> None:
    short = accept(reply, text, max_lines, 100)
    assert answer(short) == answer(neutral(text))
    assert len(short.splitlines()) <= max_lines


@given(texts, st.integers(1, 6))
def test_the_rule_is_idempotent(text: str, max_lines: int) -> None:
    short = by_rule(text, max_lines, 100)
    assert by_rule(short, max_lines, 100) == short
