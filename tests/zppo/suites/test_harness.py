"""What the harnesses are told, and their lines of samples (as lm-eval 0.4.13 and lmms-eval 0.7.3
wrote them here)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zppo.suites.harness import (
    Asking,
    Sample,
    SamplesError,
    arguments_of,
    read_samples,
    score_at,
    task_files,
)
from zppo.suites.table import Decoding, Row, Source, Suite, tasks_of

LM_EVAL = {
    "doc_id": 0, "doc": {"question": "What is 1+1?", "answer": "2"}, "target": "2",
    "arguments": {"gen_args_0": {
        "arg_0": ['[{"role": "user", "content": "What is 1+1?"}]'],
        "arg_1": {"until": [], "do_sample": False},
    }},
    "resps": [["so \\boxed{1}"]], "filtered_resps": ["1"], "filter": "none",
    "metrics": ["exact_match"],
    "doc_hash": "588207d85159d7deb61853951a2915adead0c88878a98cd3ce9a1faa35397ba7",
    "exact_match": 0.0,
}  # fmt: skip
LMMS_EVAL = {
    "doc_id": 1, "target": "4", "filtered_resps": "\\boxed{5}",
    "doc_hash": "fe12a981e0d877d447c010ae76b28e06483f29ebbbbfb643cd1edbabff04a974",
    "acc": {"score": 0.0, "kind": "even", "parsed": "4", "answer": "4"},
    "input": "What is 2+2?\nAnswer with one number.",
}  # fmt: skip
ASKING = Asking(
    url="http://127.0.0.1:5/v1", model="m", folder="/out/samples", concurrent=7, limit=3
)


def row(**changes: Any) -> Row:
    told: dict[str, Any] = {
        "short": "A", "family": "LLM", "harness": "lm-eval", "scoring": "E+J", "task": ["t"],
    }  # fmt: skip
    return Row(**{**told, **changes})


def suite(*rows: Row) -> Suite:
    return Suite(name="s", folder="/table", decoding=Decoding(), rows=list(rows))


def left_behind(folder: Path, name: str, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lines_of_lm_eval(tmp_path: Path) -> None:
    again = {**LM_EVAL, "filter": "strict"}
    name = "samples_a_task_2026-11-29T13-45-14.305293.jsonl"
    assert read_samples(row(), left_behind(tmp_path, name, LM_EVAL, again)) == [
        Sample(
            id="a_task/0/588207d8", question="What is 1+1?", gold=["2"],
            response="so \\boxed{1}", score=None,
        )
    ]  # fmt: skip


def test_lines_of_lmms_eval(tmp_path: Path) -> None:
    one = row(harness="lmms-eval", metric="acc.score", scoring="Det")
    folder = left_behind(tmp_path, "20261129_140000_samples_a_task.jsonl", LMMS_EVAL)
    assert read_samples(one, folder) == [
        Sample(
            id="a_task/1/fe12a981", question="What is 2+2?\nAnswer with one number.", gold=["4"],
            response="\\boxed{5}", score=0.0,
        )
    ]  # fmt: skip


def test_a_part_of_a_task(tmp_path: Path) -> None:
    other = {**LMMS_EVAL, "doc_id": 2, "acc": {"score": 1.0, "kind": "odd"}}
    folder = left_behind(tmp_path, "x_samples_t.jsonl", LMMS_EVAL, other)
    one = row(harness="lmms-eval", metric="acc.score", scoring="Det", part="acc.kind ~ odd$")
    assert [sample.score for sample in read_samples(one, folder)] == [1.0]


def test_the_newest_file_of_a_task_counts(tmp_path: Path) -> None:
    left_behind(tmp_path, "samples_t_1.jsonl", LM_EVAL)
    left_behind(tmp_path, "samples_t_2.jsonl", {**LM_EVAL, "resps": [["new"]]})
    assert [sample.response for sample in read_samples(row(), tmp_path)] == ["new"]


def test_a_choices_number_is_its_letter(tmp_path: Path) -> None:
    folder = left_behind(tmp_path, "samples_t_1.jsonl", {**LM_EVAL, "target": 2})
    assert read_samples(row(grader="choice"), folder)[0].gold == ["C"]
    assert read_samples(row(), folder)[0].gold == ["2"]


def test_a_list_is_several_answers_of_a_task_and_one_of_a_source(tmp_path: Path) -> None:
    folder = left_behind(tmp_path, "samples_t_1.jsonl", {**LM_EVAL, "target": [1, 2]})
    assert read_samples(row(), folder)[0].gold == ["1", "2"]
    source = Source(path="p", question="q", answer="a")
    assert read_samples(row(task=[], source=source), folder)[0].gold == ["[1, 2]"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, "KeyError: 'doc_id'"),
        ({**LM_EVAL, "resps": [[7]]}, "TypeError: a response is int"),
    ],
)
def test_lines_of_another_form(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    folder = left_behind(tmp_path, "samples_t_1.jsonl", line)
    with pytest.raises(SamplesError) as error:
        read_samples(row(), folder)
    assert str(error.value) == (
        f"samples_t_1.jsonl:1: lm-eval writes samples in another form than expected ({said})"
    )


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("exact_match", 0.0), ("acc.score", 0.0), ("acc.parsed = acc.answer", 1.0),
        ("acc.kind = acc.answer", 0.0), ("nowhere", None), ("acc.kind", None),
        ("nowhere.x = acc.answer", None),
    ],
)  # fmt: skip
def test_where_a_score_stands(metric: str, score: float | None) -> None:
    assert score_at({**LM_EVAL, **LMMS_EVAL}, metric) == score


def test_lm_eval_is_told_through_definitions_of_ours() -> None:
    source = Source(path="json", files=["q.jsonl"], question="{{q}}", answer="{{a}}")
    one = row(task=[], source=source)
    [(name, content)] = task_files(one, Path("/table")).items()
    told = json.loads(content)
    assert (name, told["task"], told["doc_to_text"]) == ("zppo_A.yaml", "zppo_A", "{{q}}")
    assert told["dataset_kwargs"] == {"data_files": {"test": ["/table/q.jsonl"]}}
    words = arguments_of(one, suite(one), ASKING)
    assert words[words.index("--include_path") + 1] == "/out/samples/tasks"
    assert words[words.index("--limit") + 1] == "3"
    assert json.loads(words[words.index("--model_args") + 1])["num_concurrent"] == 7


def test_a_task_for_each_configuration() -> None:
    source = Source(path="p", names=["I", "II"], question="", answer="")
    one = row(task=[], source=source)
    assert tasks_of(one) == ["zppo_A_I", "zppo_A_II"]
    names = [json.loads(text)["dataset_name"] for text in task_files(one, Path("/")).values()]
    assert names == ["I", "II"]


def test_lmms_eval_is_told_no_comma() -> None:
    one = row(harness="lmms-eval", include="defs")
    words = arguments_of(one, suite(one), ASKING)
    told = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
    assert (told["base_url"], told["model_version"]) == ("http://127.0.0.1:5/v1", "m")
    assert words[words.index("--include_path") + 1] == "/table/defs"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"acc": 10**400}, "OverflowError: int too large to convert to float"),
        ({"resps": None}, "TypeError: a response is NoneType"),
        ({"arguments": []}, "TypeError: list indices must be integers or slices, not str"),
    ],
)
def test_lines_with_other_values(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    left_behind(tmp_path, "samples_t_2026-01-01.jsonl", LM_EVAL | change)
    with pytest.raises(SamplesError) as error:
        read_samples(row(scoring="Det", metric="acc"), tmp_path)
    assert str(error.value) == (
        "samples_t_2026-01-01.jsonl:1: lm-eval writes samples in another form than expected "
        f"({said})"
    )


def test_a_gold_that_only_looks_like_a_number(tmp_path: Path) -> None:
    left_behind(tmp_path, "samples_t_2026-01-01.jsonl", LM_EVAL | {"target": "\N{SUPERSCRIPT TWO}"})
    [sample] = read_samples(row(grader="choice"), tmp_path)
    assert sample.gold == ["\N{SUPERSCRIPT TWO}"]


def test_a_task_without_samples(tmp_path: Path) -> None:
    left_behind(tmp_path, "samples_t_2026-01-01.jsonl", LM_EVAL)
    with pytest.raises(SamplesError) as error:
        read_samples(row(task=["t", "u"]), tmp_path)
    assert str(error.value) == "lm-eval left samples of t alone; expected t, u"
