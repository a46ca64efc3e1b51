"""The table of a suite: what may stand in it, and what is said about what may not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from zppo.errors import UserError
from zppo.suites.harness import without_directives
from zppo.suites.table import PAPER, decoding_of, load_suite, read_table

ROW = "{short: A, family: LLM, harness: lm-eval, scoring: E+J, task: [a]}"


def write(folder: Path, *rows: str, decoding: str = "{}") -> str:
    path = folder / "mine.yaml"
    path.write_text(f"decoding: {decoding}\nrows:\n" + "".join(f"  - {row}\n" for row in rows))
    return str(path)


def refusal(name: str, *only: str) -> str:
    with pytest.raises(UserError) as error:
        load_suite(name, list(only))
    return str(error.value)


def test_the_paper_has_31_benchmarks_in_three_families() -> None:
    rows = read_table(PAPER).rows
    assert Counter(row.family for row in rows) == {"VLM": 16, "LLM": 10, "video": 5}
    # Table B.2 of the paper, column "scoring".
    scoring = Counter(row.scoring for row in rows)
    assert scoring == {"E+J": 18, "R+J": 5, "Det": 3, "BJ": 5}
    assert [row.short for row in rows if row.scoring == "BJ"] == [
        "CharXiv", "MM-Vet", "HLE", "MultiCh", "MMVU",
    ]  # fmt: skip


def test_the_papers_decoding() -> None:
    suite = load_suite("paper", [])
    told = decoding_of(suite.rows[0], suite)
    assert (told.max_new_tokens, told.temperature, told.top_p) == (12_288, 0.6, 0.95)
    assert (told.top_k, told.min_p, told.presence_penalty) == (20, 0.0, 1.5)
    assert told.repetition_penalty == 1.0


@pytest.mark.parametrize(("name", "count"), [("vlm", 16), ("llm", 10), ("video", 5)])
def test_a_family_is_a_suite(name: str, count: int) -> None:
    assert len(load_suite(name, []).rows) == count


@pytest.mark.parametrize(
    ("short", "prompt", "left"),
    [
        ("AI2D", "What?\nA. x\nAnswer with the option's letter from the given choices directly.", "What?\nA. x"),
        ("EmbSp", "Note: You only need to respond with A, B, C, D without providing any additional information.\nWhat?", "What?"),
        ("MVision", 'Please solve the problem step by step and put your answer in one "\\boxed{}".What?', "What?"),
        ("MVista", "What?\nAnswer the question using a single floating-point number with two decimal places.", "What?"),
        ("BabyV", "What?\nThink about the question and give your final answer in \\boxed{Answer} format.", "What?"),
        ("MMVU", "Question:What?\nVisual Information: processed video\nDo not generate any intermediate reasoning process. Answer directly with the option letter from the\ngiven choices.\n", "Question:What?\nVisual Information: processed video"),
        ("GPQA-D", "What?\n(D) z\nLet's think step by step: ", "What?\n(D) z"),
    ],
)  # fmt: skip
def test_directives_of_the_harnesses_are_taken_out(short: str, prompt: str, left: str) -> None:
    """Prompts as lm-eval 0.4.13 and lmms-eval 0.7.3 write them."""
    row = next(row for row in read_table(PAPER).rows if row.short == short)
    assert without_directives(prompt, row.directives) == left


def test_a_row_changes_the_decoding(tmp_path: Path) -> None:
    own = ROW.replace("task", "decoding: {temperature: 1.0}, task")
    suite = load_suite(write(tmp_path, own, decoding="{max_new_tokens: 9}"), [])
    told = decoding_of(suite.rows[0], suite)
    assert (told.temperature, told.max_new_tokens, told.top_k) == (1.0, 9, 20)


def test_unknown_names_are_said_with_the_nearest() -> None:
    assert refusal("papr") == (
        "--suite is 'papr'; expected paper, llm, vlm, video or a YAML file (did you mean 'paper'?)"
    )
    assert refusal("llm", "IMOAB") == (
        "--only: the suite 'llm' has no benchmark 'IMOAB' (did you mean 'IMO-AB'?)"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW.replace("task", "taks"), "there is no setting rows[0].taks (did you mean 'task'?)"),
        (ROW.replace("E+J", "EJ"), "rows[0].scoring is 'EJ'; expected one of BJ, Det, E+J, R+J (did you mean 'E+J'?)"),
        (ROW.replace(", task: [a]", ""), "A: expected either task or source"),
        (ROW.replace("E+J", "Det"), "A: metric is missing; Det reads the harness's score"),
        (ROW.replace("task", "decoding: {top_p: 2}, task"), "A: decoding.top_p is 2; expected a number of at least 0.0 and at most 1.0"),
        (ROW.replace("task", "part: acc.kind, task"), "A: part is 'acc.kind'; expected PATH ~ REGEX"),
        (ROW.replace("[a]", "['a,b']"), "A: the tasks are 'a,b'; expected names without spaces or commas, each once"),
        (ROW.replace("task: [a]", "source: {path: p, names: [a b, a_b], question: q, answer: a}"), "A: the tasks are 'zppo_A_a_b', 'zppo_A_a_b'; expected names without spaces or commas, each once"),
        (ROW.replace("task", "directives: ['a{99999999999}'], task"), "A: 'a{99999999999}' is no regular expression (the repetition number is too large)"),
        (ROW.replace("task", "directives: ['(']  , task"), "A: '(' is no regular expression (missing ), unterminated subpattern at position 0)"),
        (ROW.replace("lm-eval", "lmms-eval").replace("task: [a]", "source: {path: p, question: q, answer: a}"), "A: a source needs harness: lm-eval; expected task"),
    ],
)  # fmt: skip
def test_mistakes_in_a_table(tmp_path: Path, row: str, said: str) -> None:
    path = write(tmp_path, row)
    assert refusal(path) == f"{path}: {said}"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    source = "source: {path: json, files: [no.jsonl], question: q, answer: a}"
    path = write(tmp_path, ROW.replace("task: [a]", source))
    assert refusal(path) == (
        f"{path}: A: source.files has 'no.jsonl'; there is no file {tmp_path}/no.jsonl"
    )
    path = write(tmp_path, ROW.replace("task", "include: tasks, task"))
    assert refusal(path) == f"{path}: A: include is 'tasks'; there is no folder {tmp_path}/tasks"


def test_two_rows_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path, ROW, ROW.replace("short: A", "short: a"))
    assert refusal(path) == f"{path}: a is given twice"


def test_every_missing_row_says_why() -> None:
    reasons = {row.short: row.missing for row in read_table(PAPER).rows if row.missing}
    assert set(reasons) == {"CharXiv", "HLE", "MultiCh"}
    assert all(re.search(r"harness|lmms-eval", str(reason)) for reason in reasons.values())
