"""`data.reward`: every mistake in it is one sentence, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from zppo.config.load import load
from zppo.config.rewards import RewardConfig, parts_of, weighted
from zppo.errors import UserError
from zppo.grading import scored
from zppo.grading.rewards import check_parts, form_of

FILE = """
def one(question, response, row, *, most): ...
def two(completions, **columns): ...
def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...
def many(questions, responses, rows): ...
async def waits(question, response, row): ...
def last(response): ...
VALUE = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def entries(file: Path, *given: dict[str, Any]) -> list[RewardConfig]:
    text = msgspec.json.encode(given).decode().replace("mine", str(file))
    return msgspec.json.decode(text, type=list[RewardConfig])


def sentence(file: Path, *given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_parts(parts_of(entries(file, *given)))
    return str(caught.value).replace(str(file), "mine")


MISTAKES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a name": (
        [{"use": "maths"}],
        "data.reward[0].use: there is no reward 'maths' (did you mean 'math'?); or name "
        "package.module:name or ./file.py:name",
    ),
    "a function": (
        [{"use": "math"}, {"use": "mine:onee"}],
        "data.reward[1].use: 'mine' has no 'onee' (did you mean 'one'?)",
    ),
    "no function": (
        [{"use": "mine:VALUE"}],
        "data.reward[0].use: 'mine:VALUE' is of type int; expected a function of (question, "
        "response, row)",
    ),
    "TRL's signature": (
        [{"use": "mine:two"}],
        "data.reward[0].use: 'mine:two' takes (completions, **columns), as TRL calls it; expected "
        "a function of (question, response, row) around it (docs/from_trl.md)",
    ),
    "verl's signature, whose third argument is no row": (
        [{"use": "mine:compute_score"}],
        "data.reward[0].use: 'mine:compute_score' takes (data_source, solution_str, ground_truth, "
        "extra_info=None), as verl calls it; expected a function of (question, response, row) "
        "around it (docs/from_verl.md)",
    ),
    "an argument that is missing": (
        [{"use": "mine:one"}],
        "data.reward[0].use: 'mine:one' takes (question, response, row, *, most); expected a "
        "function of (question, response, row): missing a required argument: 'most'",
    ),
    "an argument of a built-in": (
        [{"use": "format", "args": {"patern": "x"}}],
        "there is no setting data.reward[0].args.patern (did you mean 'pattern'?)",
    ),
    "a built-in without its argument": (
        [{"use": "format"}],
        "data.reward[0].args.pattern is missing; expected a text",
    ),
    "a pattern": (
        [{"use": "format", "args": {"pattern": "("}}],
        "data.reward[0].args.pattern is '('; expected a regular expression (missing ), "
        "unterminated subpattern at position 0)",
    ),
    "lengths": (
        [{"use": "length", "args": {"free": 9, "limit": 9}}],
        "data.reward[0].args.limit is 9; expected more than 9, free",
    ),
    "two ways to an answer": (
        [{"use": "math", "args": {"pattern": "x", "extractor": "mine:last"}}],
        "data.reward[0].args has a pattern and an extractor; expected one of the two",
    ),
    "an extractor": (
        [{"use": "math", "args": {"extractor": "mine:many"}}],
        "data.reward[0].args.extractor: 'mine:many' takes (questions, responses, rows); expected "
        "a function of (response): missing a required argument: 'responses'",
    ),
    "two that ask the teacher": (
        [{"use": "judge"}, {"use": "rubric", "args": {"rubric": "Be kind."}}],
        "data.reward[1].use is 'rubric' and data.reward[0].use is 'judge'; expected one of them, "
        "because the teacher is asked once",
    ),
    "weights for some": (
        [{"use": "math", "weight": 1.0}, {"use": "exact"}],
        "data.reward: 1 of 2 entries have a weight; expected all of them, or none for equal shares",
    ),
    "no weight at all": (
        [{"use": "math", "weight": 0.0}],
        "data.reward: every weight is 0; expected one that is not",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_sentences(file: Path, mistake: str) -> None:
    given, expected = MISTAKES[mistake]
    assert sentence(file, *given) == expected


def test_what_is_right_passes_and_has_names_and_weights(file: Path) -> None:
    given = [
        {"use": "mine:one", "args": {"most": 3}},
        {"use": "mine:many"},
        {"use": "math", "args": {"extractor": "mine:last"}},
        {"use": "math"},
    ]
    parts = parts_of(entries(file, *given))
    check_parts(parts)
    assert [part.name for part in parts] == ["one", "many", "math", "math-2"]
    assert weighted(parts, dict.fromkeys(["one", "many", "math", "math-2"], 1.0)) == 1.0


def test_the_three_forms_are_told_apart() -> None:
    space: dict[str, Any] = {}
    exec(FILE, space)
    assert [form_of(space[name]) for name in ("one", "many", "waits")] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    space["one"].batch = True
    assert form_of(space["one"]) == (True, False)


def test_shares_that_sum_to_one_give_full_marks() -> None:
    hundredths = [[a / 100, b / 100, (100 - a - b) / 100] for a in range(1, 99, 4) for b in (1, 29)]
    for weights in ([1 / 49] * 49, [0.1] * 10, [0.01, 0.29, 0.7], *hundredths):
        parts = parts_of([RewardConfig(use="math", weight=weight) for weight in weights])
        assert weighted(parts, {part.name: 1.0 for part in parts}) == 1.0


def test_a_sum_reaches_what_its_weights_say() -> None:
    parts = parts_of([RewardConfig(use="math", weight=0.7), RewardConfig(use="format", weight=0.1)])
    assert weighted(parts, {"math": 1.0, "format": 1.0}) == 0.8
    assert weighted(parts, {"math": 0.0, "format": 0.0}) == 0.0
    assert weighted(parts, {"math": 1e-20, "format": 0.0}) == 7e-21
    assert weighted(parts, {"math": 1e9, "format": 1.0}) == pytest.approx(7e8 + 0.1, rel=1e-13)


def test_a_rubric_takes_a_score_and_nothing_else() -> None:
    good = scored('<think>hm</think>{"score": 0.5}', r"\boxed{3}")
    assert (good.reward, good.answer, good.failed) == (0.5, "3", False)
    for reply in ("0.5", '{"score": 1.5}', '{"score": "1"}', '{"verdict": "correct"}', ""):
        assert scored(reply, "").failed


TOPOLOGY = """
data:
  train: t.jsonl
  reward: [{use: ./mine.py:one, args: {most: 1}}, {use: math, args: {extractor: ./mine.py:last}}]
  GRADER
student: {model: m}
method: {name: ./mine.py:METHOD}
"""


def test_paths_start_at_the_topology_and_two_rules_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(TOPOLOGY.replace("GRADER", ""))
    topology = load(file)
    assert [entry.use for entry in topology.data.reward] == [f"{tmp_path}/mine.py:one", "math"]
    assert topology.data.reward[1].args == {"extractor": f"{tmp_path}/mine.py:last"}
    assert topology.method.name == f"{tmp_path}/mine.py:METHOD"
    file.write_text(TOPOLOGY.replace("GRADER", "grader: math"))
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value) == (
        f"{file}:5: data.grader is 'math' where data.reward says what a response earns; expected "
        "one of the two"
    )
