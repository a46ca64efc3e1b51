"""The maker of word problems: the solutions are right, the files do not overlap, a seed gives the
same bytes."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_arithmetic as tool  # noqa: E402

from zppo.data.sources.base import same_words  # noqa: E402
from zppo.errors import UserError  # noqa: E402

LINE = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
EXAMPLE = ROOT / "examples" / "smollm2"


def value(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def problems(count: int, seed: int = 0) -> list[tool.Problem]:
    return list(islice(tool.distinct_problems(random.Random(seed)), count))


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_true_and_begins_where_the_last_one_ended() -> None:
    for problem in problems(600):
        *lines, box = problem.solution.splitlines()
        total = int(re.findall(r"\d+", problem.question)[0])
        for line in lines:
            match = LINE.fullmatch(line)
            assert match is not None
            left, sign, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
            assert left == total
            assert value(left, sign, right) == result
            total = result
        assert box == f"\\boxed{{{total}}}"
        assert problem.answer == total


def test_numbers_of_the_story_are_those_of_the_solution() -> None:
    for problem in problems(300):
        *lines, _ = problem.solution.splitlines()
        used = [
            number for line in lines for _, sign, number, _ in LINE.findall(line) if sign != "*"
        ]
        assert re.findall(r"\d+", problem.question)[1:] == used
        assert problem.question.count("double") == sum("*2=" in line for line in lines)


def test_steps_take_turns_and_totals_stay_in_range() -> None:
    made = problems(300)
    assert [problem.solution.count("=") for problem in made[:6]] == [1, 2, 3, 1, 2, 3]
    assert all(1 <= int(n) <= tool.LARGEST for p in made for n in re.findall(r"=(\d+)", p.solution))


def test_no_name_is_left_open() -> None:
    assert not any("{" in problem.question for problem in problems(300))


def test_files_share_no_question_and_a_seed_repeats(tmp_path: Path) -> None:
    sizes = ["--train", "60", "--heldout", "30", "--lessons", "90"]
    for folder in ("a", "b"):
        assert tool.main(["--out", str(tmp_path / folder), *sizes]) == 0
    files = {
        name: rows_of(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "heldout", "lessons")
    }
    questions = [same_words(row["question"]) for rows in files.values() for row in rows]
    assert len(set(questions)) == len(questions) == 180
    assert {name for name, rows in files.items() if "solution" in rows[0]} == {"lessons"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_another_seed_makes_other_questions() -> None:
    assert problems(5, seed=1) != problems(5, seed=2)


def test_size_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--train is 20001; expected at most 20000"):
        tool.main(["--out", str(tmp_path), "--train", "20001"])


def test_bundled_files_are_what_the_tool_makes(tmp_path: Path) -> None:
    tool.main(["--out", str(tmp_path)])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (EXAMPLE / name).read_bytes() == (tmp_path / name).read_bytes()
