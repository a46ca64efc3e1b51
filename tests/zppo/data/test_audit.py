"""The audit of a grader: completions are what they are called, and a grader that is sick in a known
way is found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zppo.cli import main
from zppo.data import audit
from zppo.data.audit import HOSTILE, RIGHT, Case, Verdict
from zppo.data.question import Question
from zppo.grading import grade, last_boxed
from zppo_protocol.values import TIMED_OUT

GOLDS = {
    "math": ["42", r"\frac{1}{2}", "(1,3)", "-7", r"5 \text{ km}", "$x^2-1$"],
    "choice": ["A", "(B)", "C, D"],
    "exact": ["Paris", "Rome", "a long sentence"],
}


def questions(grader: str) -> list[Question]:
    return [
        Question(id=f"q{i}", text=f"What is number {i}?", answer=gold, media=(), grader=grader)
        for i, gold in enumerate(GOLDS[grader])
    ]


def honest(case: Case) -> Verdict:
    """The grader itself; the one completion that only a time limit ends is taken for ended by
    it."""
    if case.kind == "a tower":
        return Verdict(False, TIMED_OUT)
    graded = grade(case.response, case.question.answer, case.question.grader)
    return Verdict(graded.reward >= 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("grader", GOLDS)
def test_our_graders_pass_on_gold_answers_of_every_sort(grader: str) -> None:
    found = audit.run("a source", questions(grader), 0, honest)
    assert found.examples == [] and found.sound
    assert found.timed_out == 1
    assert set(found.right) == set(RIGHT)
    assert found.right["a sentence"] == len(GOLDS[grader])


SICK: dict[str, tuple[Callable[[Case], bool], set[str]]] = {
    "takes text outside boxes": (
        lambda case: case.question.answer in case.response and r"\boxed" not in case.response,
        {"no box", "no box, marked"},
    ),
    "closes a box by itself": (
        lambda case: last_boxed(case.response + "}") == case.question.answer,
        {"a box never closed"},
    ),
    "reads the first box": (
        lambda case: case.response.partition(r"\boxed{")[2].startswith(case.question.answer + "}"),
        {"a box taken back", "several boxes, the last one wrong"},
    ),
    "looks whether the answer is somewhere in the box": (
        lambda case: case.question.answer in (last_boxed(case.response) or ""),
        {"two answers", "two answers, in a list", "the question and the answer", "not the answer"},
    ),
}


@pytest.mark.parametrize("disease", SICK)
def test_a_sick_grader_is_found_and_its_kinds_are_named(disease: str) -> None:
    takes, kinds = SICK[disease]
    found = audit.run("a source", questions("math")[:4], 0, lambda case: Verdict(takes(case)))
    assert kinds <= set(found.false_right), found.false_right
    text = audit.report_text(found)
    assert all(f"  {kind}\n" in text for kind in kinds)


@pytest.mark.parametrize(("reward", "side"), [(1.0, "false_right"), (0.0, "false_wrong")])
def test_rates_count_every_completion(reward: float, side: str) -> None:
    found = audit.run("a source", questions("math"), 0, lambda case: Verdict(reward >= 1.0))
    values = audit.report_values(found)
    rates = {name: values[name]["rate"] for name in ("false_right", "false_wrong")}  # type: ignore[index]
    assert rates == {"false_right": 0.0, "false_wrong": 0.0} | {side: 1.0}
    assert not found.sound
    assert len([e for e in found.examples if e.kind == "no box"]) == (
        audit.MAX_EXAMPLES if reward else 0
    )


def test_what_has_no_reward_is_in_no_rate_and_named() -> None:
    def grading(case: Case) -> Verdict:
        return Verdict(None, "it raised") if case.kind == "no box" else Verdict(case.right)

    found = audit.run("a source", questions("math"), 0, grading)
    assert (found.failed, found.sound) == (len(GOLDS["math"]), False)
    assert "no box" not in found.hostile and not found.false_wrong and not found.false_right
    assert audit.report_values(found)["failed"] == len(GOLDS["math"])
    assert "  without a reward: 6, the first because it raised\n" in audit.report_text(found)


def test_a_completion_that_happens_to_be_right_is_not_hostile() -> None:
    made = list(audit.cases([Question(id="q", text="42", answer="42", media=(), grader="math")], 0))
    assert not [case for case in made if not case.right and last_boxed(case.response) == "42"]
    assert {case.kind for case in made if not case.right} < set(HOSTILE)
    letters = [
        Question(id="q", text="Which?", answer="A, B, C, D, E, F, G, H", media=(), grader="choice")
    ]
    assert "all letters" not in {case.kind for case in audit.cases(letters, 0)}


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_grades_in_a_worker_and_prints_json(tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    rows = [{"question": f"Q{i}?", "answer": gold} for i, gold in enumerate(GOLDS["math"])]
    source.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [*rows, {"question": "Unmeetable?", "answer": "a } b"}]
        )
    )
    command = [
        sys.executable,
        "-P",
        "-m",
        "zppo.grade",
        "--audit",
        str(source),
        "--grader-seconds",
        "0.5",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["questions"], found["timed_out"]) == (7, 1)
    assert found["false_right"]["mistakes"] == 0
    assert {example["gold"] for example in found["examples"]} == {"a } b"}, (
        "whose brace closes every box too early"
    )
    mistakes = {kind: counts["mistakes"] for kind, counts in found["false_wrong"]["kinds"].items()}
    assert set(mistakes.values()) <= {0, 1} and mistakes["a sentence"] == 1
    done = subprocess.run([*command, "--limit", "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "zppo grade: the following arguments are required: --audit; see zppo grade --help"),
        (["--audit", "reasoning_gym:gcd", "--grader", "math"],
         (
             "--audit is 'reasoning_gym:gcd', which brings its own grader; expected no --grader or "
             "--field"
         )),
        (["--audit", "x.jsonl", "--correct-reward", "nan"],
         "zppo grade: argument --correct-reward: 'nan' is not a number; see zppo grade --help"),
        (["--audit", "x.jsonl", "--grader", "maths"], "data.grader: unknown grader 'maths' (did you mean 'math'?)"),
        (["--audit", "x.jsonl", "--seed", "-1"],
         "zppo grade: argument --seed: '-1' is not a whole number of at least 0; see zppo grade --help"),
        (["--audit", "x.jsonl", "--max-bad-rows", "1.5"],
         (
             "zppo grade: argument --max-bad-rows: '1.5' is not a whole number of at least 0; see "
             "zppo grade --help"
         )),
        (["--audit", "x.jsonl", "--limit", "0"],
         (
             "zppo grade: argument --limit: '0' is not a whole number of at least 1; see zppo grade "
             "--help"
         )),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["grade", *arguments]) == 2
    assert capsys.readouterr().err == sentence + "\n"
