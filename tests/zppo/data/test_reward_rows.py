"""The columns of a row, for rewards that read them: from every kind of file, bounded, and in the
digest; nothing of them where nobody reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zppo import extensions
from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, RewardConfig
from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.data.question import Question, digest
from zppo.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": "1 + 1?", "answer": 2, "level": 3, "tags": ["a", None], "tests": "assert True"},
    {"question": "2 + 2?", "answer": 4, "level": 4, "tags": [], "tests": "assert True"},
]
OWN = RewardConfig(use="acme.rewards:tidy")
CODE = RewardConfig(use="code")
FORMAT = RewardConfig(use="format", args={"pattern": "x"})


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path.name


def read(folder: Path, name: str, *reward: RewardConfig) -> list[Question]:
    config = DataConfig(train=name, reward=list(reward))
    return load_questions(name, config, folder).questions


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("reward", [OWN, CODE])
def test_all_columns_are_there_for_what_reads_them(
    tmp_path: Path, kind: str, reward: RewardConfig
) -> None:
    questions = read(tmp_path, write(tmp_path, kind, ROWS), RewardConfig(use="math"), reward)
    assert [json.loads(question.row) for question in questions] == ROWS
    assert {question.grader for question in questions} == {REWARD}


@pytest.mark.parametrize("reward", [FORMAT, RewardConfig(use="exact")])
def test_nobody_carries_what_nobody_reads(tmp_path: Path, reward: RewardConfig) -> None:
    questions = read(tmp_path, write(tmp_path, "jsonl", ROWS), reward)
    assert {question.row for question in questions} == {""}


def test_the_digest_covers_them_and_is_what_it_was_without(tmp_path: Path) -> None:
    name = write(tmp_path, "jsonl", ROWS)
    plain, own = read(tmp_path, name), read(tmp_path, name, OWN)
    edited = write(tmp_path, "jsonl", [{**row, "level": 9} for row in ROWS])
    assert digest(read(tmp_path, edited)) == digest(plain)
    assert digest(read(tmp_path, edited, OWN)) != digest(own) != digest(plain)


def test_a_row_without_the_tests_that_code_runs_is_bad(tmp_path: Path) -> None:
    """Unless it names another reward, which counts in place of it."""
    named = [{**ROWS[0], "by": "code"}, {**ROWS[1], "tests": None, "by": "math"}]
    name, rewards = write(tmp_path, "jsonl", named), [RewardConfig(use="math"), CODE]
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, *rewards)
    assert str(caught.value) == (
        f"{tmp_path / name}:2: the tests ('tests'), which the reward 'code' runs, are missing; "
        "name their column in data.reward[1].args.tests; 1 bad row where data.max_bad_rows allows "
        "0: mend the file or raise the limit"
    )
    with pytest.raises(UserError, match=r"\('test'\).*missing \(did you mean 'tests'\?\)"):
        read(tmp_path, name, RewardConfig(use="code", args={"tests": "test"}))
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, RewardConfig(use="code", args={"tests": "tags"}))
    assert str(caught.value).startswith(
        f"{tmp_path / name}:1: the tests ('tags'), which the reward 'code' runs, are a list; "
        "expected one text of Python; "
    )
    config = DataConfig(train=name, reward=rewards, fields={"grader": "by"})
    assert len(load_questions(name, config, tmp_path).questions) == 2


def test_a_gold_answer_may_be_missing_where_no_rule_needs_one(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in ROWS]
    for kind in ("jsonl", "parquet"):
        name = write(tmp_path, kind, rows)
        assert [question.answer for question in read(tmp_path, name, OWN)] == ["", ""]
        with pytest.raises(UserError):
            read(tmp_path, name, OWN, RewardConfig(use="exact"))


def test_columns_are_bounded_and_pictures_are_left_out(tmp_path: Path) -> None:
    name = write(tmp_path, "parquet", [{**row, "picture": {"bytes": b"\xff"}} for row in ROWS])
    assert [json.loads(question.row) for question in read(tmp_path, name, OWN)] == ROWS
    name = write(tmp_path, "jsonl", [{**ROWS[0], "trace": "x" * 300_000}])
    with pytest.raises(UserError, match="at most 262144 go with a question to rewards"):
        read(tmp_path, name, OWN)


def test_what_json_cannot_carry_is_left_out(tmp_path: Path) -> None:
    nested: list[object] = []
    for _ in range(2000):
        nested = [nested]
    odd = {"nested": nested, "half": "\ud800", "\ud800": 1, "set": {1}}
    (tmp_path / "own.py").write_text("def rows():\n    return [ROW]\n")
    use = f"{tmp_path / 'own.py'}:rows"
    found = extensions.load(use, use, "source").value
    found.__globals__["ROW"] = {**ROWS[0], **odd}
    [question] = read(tmp_path, use, OWN)
    assert json.loads(question.row) == {**ROWS[0], "set": [1]}


def test_a_row_may_name_the_one_part_that_counts(tmp_path: Path) -> None:
    rubric = RewardConfig(use="rubric", args={"rubric": "Be kind."})
    kinds = ["tidy", "rubric", None, "exact"]
    rows = [{**ROWS[0], "question": f"{i}?", "kind": kind} for i, kind in enumerate(kinds)]
    name = write(tmp_path, "jsonl", rows)
    rewards = [OWN, rubric, RewardConfig(use="exact")]
    config = DataConfig(train=name, reward=rewards, fields={"grader": "kind"})
    found = load_questions(name, config, tmp_path).questions
    assert [question.grader for question in found] == [
        f"{REWARD}:tidy",
        f"{REWARD_AND_TEACHER}:rubric",
        REWARD_AND_TEACHER,
        f"{REWARD}:exact",
    ]
    name = write(tmp_path, "jsonl", [{**ROWS[0], "kind": "tidi"}])
    with pytest.raises(UserError, match=r"the grader \('kind'\) is 'tidi' \(did you mean 'tidy'"):
        load_questions(name, config, tmp_path)


def test_a_part_of_the_teachers_shows_in_the_grader(tmp_path: Path) -> None:
    name = write(tmp_path, "jsonl", ROWS)
    rubric = RewardConfig(use="rubric", args={"rubric": "Be kind."})
    assert {q.grader for q in read(tmp_path, name, rubric)} == {REWARD_AND_TEACHER}
