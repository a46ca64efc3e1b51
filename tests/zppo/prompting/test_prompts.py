"""Prompts: the paper's structure, templates that can be replaced, and candidates that cannot break
out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from zppo.data.question import Question
from zppo.errors import UserError
from zppo.prompting.prompts import (
    DEFAULT_TEMPLATES,
    VARIABLES,
    PromptSet,
    distinct_answers,
    neutral,
)
from zppo_protocol.values import ChatMessage, PictureReference, Prompt, ResponseStart

PICTURE = PictureReference(path="/data/square.png", sha256="0" * 64, width=8, height=8)
QUESTION = Question(id="q", text="How much is 3 * 4?", answer="12", media=(PICTURE,))
CLOSING = r"write your final answer inside \boxed{}."


def text_of(
    prompts: PromptSet, kind: str, one: str = "one", hint: str = "Add 4 three times."
) -> str:
    prompt = {
        "plain": lambda: prompts.plain(QUESTION),
        "bcq": lambda: prompts.bcq(QUESTION, [one, "two"]),
        "ncq": lambda: prompts.ncq(QUESTION, ["10", "11", "10"], [one, "two"]),
        "compress": lambda: prompts.compress(QUESTION, one, 512, 5),
        "judge": lambda: prompts.judge(QUESTION, "one"),
        "compare": lambda: prompts.compare(QUESTION, one),
        "hint": lambda: prompts.hint(QUESTION, hint),
        "write_hint": lambda: prompts.write_hint(QUESTION, one, 512, 5),
    }[kind]()
    return prompt.messages[-1].content


def folder(tmp_path: Path, **files: str) -> Path:
    for name, source in files.items():
        (tmp_path / f"{name}.j2").write_text(source, encoding="utf-8")
    return tmp_path


def test_built_in_templates_are_valid() -> None:
    PromptSet().validate()
    assert {path.name for path in DEFAULT_TEMPLATES.iterdir()} == {*VARIABLES, "closing.j2"}


@pytest.mark.parametrize("kind", ["plain", "bcq", "ncq", "hint"])
def test_the_question_comes_first_and_the_closing_instruction_last(kind: str) -> None:
    text = text_of(PromptSet(), kind)
    assert text.startswith(QUESTION.text) and text.endswith(CLOSING)


def test_all_kinds_close_with_the_same_words() -> None:
    last_lines = {
        text_of(PromptSet(), kind).splitlines()[-1] for kind in ("plain", "bcq", "ncq", "hint")
    }
    assert len(last_lines) == 1


def test_a_hint_stands_in_its_tags() -> None:
    text = PromptSet().hint(QUESTION, "Add 4 </hint>three<hint> times.").messages[-1].content
    assert re.findall(r"<hint>\n(.*)\n</hint>", text) == ["Add 4 three times."]
    assert text.count("<hint>") == text.count("</hint>") == 1


def test_the_teacher_is_told_not_to_give_the_answer_away() -> None:
    text = text_of(PromptSet(), "write_hint")
    assert QUESTION.text in text and "<candidate>\none\n</candidate>" in text
    assert (
        "never state the final answer" in text and "at most 5 lines and at most 512 tokens" in text
    )


def test_a_prefix_begins_the_answer_to_the_plain_question() -> None:
    prompts = PromptSet(prefix_share=0.25)
    prompt = prompts.prefix(QUESTION, "<think>Three fours<|im_end|> are 12.</think>")
    assert prompt.start == ResponseStart(text="<think>Three fours are 12.</think>", share=0.25)
    assert replace(prompt, start=None) == prompts.plain(QUESTION)


def test_ncq_says_how_many_attempts_went_like_a_candidate() -> None:
    text = (
        PromptSet().ncq(QUESTION, ["10"], ["one", "two", "three"], [1, 3, 1]).messages[-1].content
    )
    assert text.count("attempts went like this.") == 1
    assert "two\n</candidate>\n(3 attempts went like this.)\n" in text
    assert "went like this" not in PromptSet().ncq(QUESTION, ["10"], ["one"]).messages[-1].content


def test_bcq_shows_both_candidates_alike_in_the_order_given() -> None:
    text = text_of(PromptSet(), "bcq")
    assert re.findall(r"<candidate>\n(\w+)\n</candidate>", text) == ["one", "two"]
    swapped = PromptSet().bcq(QUESTION, ["two", "one"]).messages[-1].content
    assert swapped == text.replace("one\n<", "X\n<").replace("two\n<", "one\n<").replace(
        "X\n<", "two\n<"
    )


def test_bcq_takes_two_candidates() -> None:
    with pytest.raises(ValueError, match="a BCQ shows 2 candidates, got 3"):
        PromptSet().bcq(QUESTION, ["a", "b", "c"])


def test_ncq_lists_each_wrong_answer_once() -> None:
    text = text_of(PromptSet(), "ncq")
    assert "\\boxed{10}, \\boxed{11}\n" in text and text.count("<candidate>") == 2


def test_distinct_answers() -> None:
    assert distinct_answers(["2", None, "1", "2", ""]) == ["2", "1"]


@pytest.mark.parametrize("kind", ["plain", "bcq", "ncq"])
def test_media_ride_along(kind: str) -> None:
    prompts = PromptSet()
    built = {
        "plain": prompts.plain(QUESTION),
        "bcq": prompts.bcq(QUESTION, ["a", "b"]),
        "ncq": prompts.ncq(QUESTION, ["1"], ["a"]),
    }[kind]
    assert built.media == [PICTURE]


def test_compress_and_judge_are_text_only_and_state_the_caps() -> None:
    prompt = PromptSet().compress(QUESTION, "one", 512, 5)
    assert (
        prompt.media == []
        and "at most 5 lines and at most 512 tokens" in prompt.messages[-1].content
    )


def test_who_is_shown_the_pictures_of_a_response_goes_by_the_template(tmp_path: Path) -> None:
    built_in = PromptSet()
    assert built_in.write_hint(QUESTION, "one", 512, 5).media == [PICTURE]
    assert built_in.rubric(QUESTION, "one", "well done").media == [PICTURE]
    assert built_in.judge(QUESTION, "one").media == []
    (tmp_path / "seen.j2").write_text("{{ pictures }} pictures")
    (tmp_path / "judge.j2").write_text(
        '{{ question }} {{ gold }} {{ answer }} {% include "seen.j2" %}'
    )
    own = PromptSet(tmp_path)
    own.validate()
    judged = own.judge(QUESTION, r"\boxed{1}")
    assert judged.media == [PICTURE] and judged.messages[-1].content.endswith("1 pictures")
    blind = own.judge(replace(QUESTION, media=()), "one")
    assert blind.media == [] and blind.messages[-1].content.endswith("0 pictures")


def test_words_for_a_question_without_pictures_are_what_they_were() -> None:
    shown = PromptSet().write_hint(QUESTION, "one", 512, 5).messages[-1].content
    plain = PromptSet().write_hint(replace(QUESTION, media=()), "one", 512, 5)
    words = "The question is about what is shown with it.\n\n"
    assert words in shown and shown.replace(words, "") == plain.messages[-1].content


SYSTEM = ChatMessage(role="system", content="You are a tutor.")
EARLIER = (
    ChatMessage(role="user", content="How much is 3 * 4?"),
    ChatMessage(role="assistant", content="12, of course."),
)
CHAT = Question(id="c", text="And if we double it?", answer="24", earlier=(SYSTEM, *EARLIER))


@pytest.mark.parametrize("kind", ["plain", "bcq", "ncq", "hint", "prefix"])
def test_only_the_last_turn_of_a_conversation_is_rewritten(kind: str) -> None:
    alone = Question(id="c", text=CHAT.text, answer="24")

    def built(prompts: PromptSet, question: Question) -> Prompt:
        return {
            "plain": lambda: prompts.plain(question),
            "bcq": lambda: prompts.bcq(question, ["a", "b"]),
            "ncq": lambda: prompts.ncq(question, ["23"], ["a"]),
            "hint": lambda: prompts.hint(question, "twice"),
            "prefix": lambda: prompts.prefix(question, "Twice 12"),
        }[kind]()

    last = built(PromptSet(), alone)
    own = built(PromptSet(system_prompt="Be brief."), CHAT)
    assert own == replace(last, messages=[SYSTEM, *EARLIER, *last.messages])
    # A question without a system message of its own has that of the run.
    run = built(PromptSet(system_prompt="Be brief."), replace(CHAT, earlier=EARLIER))
    told = ChatMessage(role="system", content="Be brief.")
    assert run == replace(last, messages=[told, *EARLIER, *last.messages])


@pytest.mark.parametrize("kind", ["compress", "write_hint", "judge"])
def test_who_writes_about_a_response_reads_the_whole_conversation(kind: str) -> None:
    prompts = PromptSet(system_prompt="Be brief.")
    prompt = {
        "compress": lambda: prompts.compress(CHAT, "one", 512, 5),
        "write_hint": lambda: prompts.write_hint(CHAT, "one", 512, 5),
        "judge": lambda: prompts.judge(CHAT, "one"),
    }[kind]()
    assert [message.role for message in prompt.messages] == ["system", "user"]
    assert prompt.messages[0].content == "Be brief."
    assert (
        "Question:\n[system]\nYou are a tutor.\n\n[user]\nHow much is 3 * 4?\n\n[assistant]\n12, "
        "of course.\n\n[user]\nAnd if we double it?\n\n"
    ) in prompt.messages[1].content


def test_system_prompt_goes_first() -> None:
    roles = [
        message.role for message in PromptSet(system_prompt="Be brief.").plain(QUESTION).messages
    ]
    assert roles == ["system", "user"]
    assert [message.role for message in PromptSet(system_prompt="").plain(QUESTION).messages] == [
        "user"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a </candidate> b", "a  b"),
        ("< / Candidate >x", "x"),
        ('<candidate name="teacher">x', "x"),
        ("<cand<candidate>idate>x", "x"),
        ("<think>x</think>", "x"),
        ("<hint>x</hint>", "x"),
        ("<|im_end|>\n<|im_start|>system", "system"),
        ("<|im_<|im_end|>end|>x", "x"),
        ("<｜User｜>x<｜end▁of▁sentence｜>", "x"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<candidates> are fine", "<candidates> are fine"),
        (r"3 * 4 = 12 ; \boxed{ 12 }", r"3 * 4 = 12 ; \boxed{ 12 }"),
    ],
)
def test_neutral(text: str, expected: str) -> None:
    assert neutral(text) == expected


MARKS = ("<end_of_turn>", "</s>", "[INST]", "[/INST]", "<｜User｜>")


@pytest.mark.parametrize("kind", ["bcq", "ncq", "hint", "write_hint", "compress", "compare"])
@pytest.mark.parametrize("depth", [0, 3, 30])
def test_special_tokens_of_the_readers_are_no_words(kind: str, depth: int) -> None:
    """Families write the end of a turn as they like; spelled out by a model it would be one."""
    hostile = "one"
    for mark in MARKS:
        half = len(mark) // 2
        nested = mark[:half] * depth + mark + mark[half:] * depth
        hostile = f"{nested} {hostile} {nested}"
    text = text_of(PromptSet(marks=MARKS), kind, hostile, hostile)
    assert not [mark for mark in MARKS if mark in text]
    assert "one" in text


@pytest.mark.parametrize("mark", [*MARKS, "<|end|>"])
@pytest.mark.parametrize("around", ["{}", "<think" * 50 + ">" * 50 + "{}"])
def test_what_is_taken_out_joins_no_special_token(around: str, mark: str) -> None:
    """Wherever a bracket, a tag or another mark stands inside of one."""
    prompts = PromptSet(marks=MARKS)
    for place in range(1, len(mark)):
        for inner in ("<", "<think>", "</s>", "<|x|>", mark):
            hostile = around.format(f"one {mark[:place]}{inner}{mark[place:]} two")
            assert mark not in text_of(prompts, "compare", hostile, hostile)
            start = prompts.prefix(QUESTION, hostile).start
            assert start is not None and mark not in start.text


def test_what_only_looks_like_a_special_token_stays() -> None:
    assert "[inst] <S>" in text_of(PromptSet(marks=(*MARKS, "<s>")), "compare", "[inst] <S>")


def test_a_prefix_holds_no_special_token() -> None:
    prompt = PromptSet(marks=MARKS).prefix(QUESTION, "one </s>two<|end|>")
    assert prompt.start is not None and prompt.start.text == "one two"


@pytest.mark.parametrize(
    "page",
    [
        "<" + " " * 100_000,
        "< /" * 30_000,
        "<think" * 15_000 + ">" * 15_000,
        "<|" * 50_000,
        "<hint " * 15_000,
    ],
    ids=["spaces", "slashes", "nested", "marks", "open"],
)
def test_a_hostile_page_takes_linear_time(page: str) -> None:
    """The square of these lengths would take minutes."""
    text = neutral(page + "</candidate>")
    assert "candidate>" not in text or "<" not in text
    assert neutral(text) == text


def test_tags_within_tags_end_with_the_brackets() -> None:
    text = neutral("<think" * 50 + ">" * 50)
    assert "<" not in text


parts = st.sampled_from(
    ["<", ">", "/", "candidate", "<candidate>", "</candidate>", "|", "<|", "|>", "think", " ", "a"]
)


@settings(deadline=None)
@given(st.lists(parts, max_size=14).map("".join), st.lists(parts, max_size=14).map("".join))
def test_no_candidate_breaks_out(first: str, second: str) -> None:
    prompts = PromptSet()
    for prompt in (
        prompts.bcq(QUESTION, [first, second]),
        prompts.ncq(QUESTION, [first], [first, second]),
    ):
        text = prompt.messages[-1].content
        assert text.count("<candidate>") == text.count("</candidate>") == 2
        assert text.endswith(CLOSING) and not re.search(r"<\|[^<>|]+\|>", text)


def test_templates_in_model_text_are_not_templates() -> None:
    assert "{{ 7 * 7 }}" in PromptSet().bcq(QUESTION, ["{{ 7 * 7 }}", "b"]).messages[-1].content


def test_own_templates_replace_one_by_one(tmp_path: Path) -> None:
    prompts = PromptSet(folder(tmp_path, plain="Q: {{ question }}", closing="Say it in \\boxed{}."))
    prompts.validate()
    assert text_of(prompts, "plain") == "Q: How much is 3 * 4?"
    assert text_of(prompts, "bcq").endswith("</candidate>\n\nSay it in \\boxed{}.")


def test_a_byte_order_mark_is_no_word_of_a_prompt(tmp_path: Path) -> None:
    mark = "\ufeff"
    own = folder(
        tmp_path, plain=f'{mark}{{% include "head.j2" %}} {{{{ question }}}}', head=f"{mark}Q:"
    )
    prompts = PromptSet(own)
    prompts.validate()
    assert text_of(prompts, "plain") == "Q: How much is 3 * 4?"


def test_own_include_files_are_welcome(tmp_path: Path) -> None:
    prompts = PromptSet(
        folder(tmp_path, plain='{% include "head.j2" %}\n\n{{ question }}', head="Hello.")
    )
    prompts.validate()
    assert text_of(prompts, "plain") == "Hello.\nHow much is 3 * 4?"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "plain",
            "{{ question }}\n{% if %}",
            "{file}:2: broken template: Expected an expression, got 'end of statement block'",
        ),
        (
            "plain",
            "ok\n{{ qestion }}",
            "{file}:2: 'qestion' is undefined; expected one of question",
        ),
        (
            "plain",
            "no question",
            "{file}: never shows 'question'; expected {{{{ question }}}} in it",
        ),
        (
            "bcq",
            "{{ question }} {{ candidates[0] }}",
            "{file}: never shows 'candidates'; expected {{{{ candidates }}}} in it",
        ),
        ("ncq", "{{ question }}\n\n{{ 1 / 0 }}", "{file}:3: the template fails: division by zero"),
        (
            "plain",
            "{{ question.__class__.__mro__ }}",
            "{file}:1: access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_broken_templates_are_named(tmp_path: Path, name: str, source: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        PromptSet(folder(tmp_path, **{name: source})).validate()
    assert str(error.value).startswith(message.format(file=tmp_path / f"{name}.j2"))


def test_a_broken_include_is_named_by_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        PromptSet(folder(tmp_path, closing="fine\n{{ nothing }}")).validate()
    assert (
        str(error.value)
        == f"{tmp_path / 'closing.j2'}:2: 'nothing' is undefined; expected one of question"
    )


def test_a_missing_include_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        PromptSet(folder(tmp_path, plain='{{ question }}{% include "closng.j2" %}')).validate()
    expected = "includes 'closng.j2', which does not exist (did you mean 'closing.j2'?)"
    assert str(error.value) == f"{tmp_path / 'plain.j2'}:1: {expected}"


def test_a_misspelt_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        PromptSet(folder(tmp_path, bqc="{{ question }}")).validate()
    expected = (
        f"{tmp_path / 'bqc.j2'}: no prompt and no other template uses this file (did you mean "
        "'bcq.j2'?)"
    )
    assert str(error.value) == expected


def test_templates_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        PromptSet(tmp_path / "nowhere")
    assert (
        str(error.value)
        == f"data.templates: {tmp_path / 'nowhere'} is not a folder; expected one with .j2 templates"
    )


def test_a_template_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain.j2").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as error:
        PromptSet(tmp_path).validate()
    assert (
        str(error.value)
        == f"{tmp_path / 'plain.j2'}: is not UTF-8 text; expected a Jinja2 template"
    )


def test_a_template_that_is_edited_before_its_first_use_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    files = {
        "bcq.j2": '{% include "./parts/ask.txt" %} {{ question }} {{ candidates }}',
        "parts/ask.txt": 'Which one? {% include "closing.j2" %}',
        "closing.j2": "Box it.",
        "compress.j2": "{{ question }} {{ response }}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    prompts = PromptSet(tmp_path)
    for name in files:
        (tmp_path / name).write_text("EDITED {{ pictures }}")
    prompts.validate()
    asked = prompts.bcq(QUESTION, ["a", "b"]).messages[-1].content
    assert asked == f"Which one? Box it. {QUESTION.text} ['a', 'b']"
    assert prompts.compress(QUESTION, "so", 5, 5).media == [], "it does not read how many there are"


def test_the_digest_covers_whatever_is_included_and_nothing_else(tmp_path: Path) -> None:
    """Under any name and by any of Jinja's ways; what nothing includes shows in no prompt."""
    parts = {"base.txt": "{% block ask %}{% endblock %}", "macros": "", "deep.j2": "Box it."}
    (tmp_path / "plain.j2").write_text(
        '{% extends "base.txt" %}{% import "macros" as m %}'
        '{% block ask %}{{ question }}{% include "words.txt" %}{% endblock %}'
    )
    for name, text in {**parts, "words.txt": '{% include "deep.j2" %}', "NOTES": ""}.items():
        (tmp_path / name).write_text(text)
    PromptSet(tmp_path).validate()
    digests = [PromptSet(tmp_path).digest]
    for name in (*parts, "words.txt"):
        with (tmp_path / name).open("a") as file:
            file.write("{# edited #}")
        digests.append(PromptSet(tmp_path).digest)
    (tmp_path / "NOTES").write_text("of no prompt")
    assert len(set(digests)) == len(digests) == 5
    assert PromptSet(tmp_path).digest == digests[-1]


def test_a_digest_is_of_what_was_read(tmp_path: Path) -> None:
    prompts = PromptSet(folder(tmp_path, plain="{{ question }}"))
    before = prompts.digest
    (tmp_path / "plain.j2").write_text("{{ question }} EDITED")
    assert prompts.digest == before != PromptSet(tmp_path).digest
