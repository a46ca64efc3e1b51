"""`zppo data`: what it counts, what it shows, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zppo.cli import main
from zppo.data.survey import kind_of_gold, lengths_of, spread

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "How much is 3 * 4?"}
REPLY = {"role": "assistant", "content": "12"}
AGAIN = {"role": "user", "content": "And doubled? \x1b[2J"}
ROWS: list[Any] = [
    {"id": "chat", "prompt": [SYSTEM, ASK, REPLY, AGAIN], "solution": "Twice.\n#### 24"},
    {"id": "plain", "prompt": "1 + 1?", "solution": "2"},
    {"id": "again", "prompt": "1 +  1?", "solution": "2"},
    7,
]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["data", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "train.jsonl", *ROWS)
    held = write(
        tmp_path / "held.jsonl",
        {"question": "1 + 1 ?", "answer": "2"},
        ROWS[1] | {"question": "1 + 1?", "answer": "2"},
    )
    code, found = figures(capsys, file, "--heldout", held, "--max-bad-rows", 2)
    assert code == 1  # because of the overlap alone
    shown = found.pop("shown")
    characters = sum(len(turn["content"].strip()) for turn in (SYSTEM, ASK, REPLY, AGAIN))
    assert found == {
        "source": str(file),
        "layout": "TRL",
        "rows": 4,
        "questions": 2,
        "repeated": 1,
        "bad_rows": [
            {"line": 3, "reason": "asks the same as line 2", "repeats": True},
            {
                "line": 4,
                "reason": "a number where a JSON object was expected",
                "repeats": False,
            },
        ],
        "unit": "line",
        "max_bad_rows": 2,
        "conversations": 1,
        "system_messages": 1,
        "pictures": 0,
        "placed": 0,
        "unshown": {},
        "graders": {"math": 2},
        "gold_answers": {"whole number": 2},
        "worked_solutions": 1,
        "lengths": {
            "unit": "characters",
            "least": 6,
            "median": 6,
            "nine_of_ten": characters,
            "most": characters,
            "limit": None,
            "above": 0,
        },
        "held_out": 2,
        "held_out_unshown": {},
        "overlap": ["plain"],
    }
    assert [one["id"] for one in shown] == ["chat", "plain"]
    assert shown[0]["prompt"].startswith(
        "[system]\nBe brief.\n[user]\nHow much is 3 * 4?\n[assistant]\n12\n[user]\nAnd doubled?"
    )


def test_the_text_ends_with_the_figures_and_spells_control_marks_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(write(tmp_path / "train.jsonl", *ROWS)), "--show", "1"]) == 1
    out = capsys.readouterr().out
    assert "── chat · gold answer: Twice. #### 24\n[system]\n" in out
    assert "And doubled? \\x1b[2J" in out and "\x1b" not in out
    assert out.endswith(
        "  repeated      1\n"
        "  bad rows      2, data.max_bad_rows allows 0\n"
        "                line 3: asks the same as line 2\n"
        "                line 4: a number where a JSON object was expected\n"
    )


@pytest.mark.slow
def test_a_topology_brings_its_model_and_its_held_out_questions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found = figures(capsys, QUICKSTART, "--show", 3)
    assert code == 0 and found["held_out"] == 256 and found["overlap"] == []
    assert found["lengths"]["unit"] == "tokens" and found["lengths"]["limit"] == 64
    assert len(found["shown"]) == 3
    assert all(one["prompt"].startswith("<bos> <user>") for one in found["shown"])


def test_held_out_questions_of_a_package_beside_a_topology(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a module is no path."""
    (tmp_path / "held_rows.py").write_text(
        "def rows():\n    yield {'question': '1 + 1', 'answer': 2}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "train.jsonl", {"question": "1 + 1", "answer": "2"})
    topology = tmp_path / "topology.yaml"
    topology.write_text("data: {train: train.jsonl}\nstudent: {model: none}\nteacher: null\n")
    code, found = figures(capsys, topology, "--heldout", "held_rows:rows")
    assert code == 1 and found["held_out"] == 1 and len(found["overlap"]) == 1


@pytest.mark.slow
def test_prompts_that_are_too_long_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = tmp_path / "topology.yaml"
    folder = ROOT / "examples" / "quickstart"
    topology.write_text(
        f"data: {{train: {folder}/train.jsonl, templates: {folder}/templates, "
        f"max_prompt_tokens: 16}}\nstudent: {{model: {folder}/student}}\n"
    )
    code, found = figures(capsys, topology, "--show", 0)
    assert code == 1 and found["shown"] == []
    assert 0 < found["lengths"]["above"] < 2560


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/no.jsonl"], "{}/no.jsonl: no such question file (did you mean 'bad.jsonl'?)"),
        (
            ["{}/bad.jsonl"],
            "{}/bad.jsonl: holds no question; expected at least one row, and line 1: a number "
            "where a JSON object was expected",
        ),
        (
            [str(QUICKSTART), "--grader", "exact"],
            f"--grader is given with a topology; expected it in the section data of {QUICKSTART}",
        ),
        (
            ["reasoning_gym:chain_sum", "--grader", "exact"],
            "DATA is 'reasoning_gym:chain_sum', which brings its own grader; expected no --grader "
            "or --field",
        ),
        (
            ["{}/bad.jsonl", "--field", "ids=a"],
            "--field: Invalid enum value 'ids' - at `key` in `$.fields`; expected one of id, "
            "question, answer, images, videos, system_prompt, grader = COLUMN",
        ),
        (
            ["{}/bad.jsonl", "--show", "-1"],
            "zppo data: argument --show: '-1' is not a whole number of at least 0; see zppo data "
            "--help",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path / "bad.jsonl", 7)
    assert main(["data", *(one.replace("{}", str(tmp_path)) for one in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err == message.replace("{}", str(tmp_path)) + "\n" and said.out == ""


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    rows = [{"question": f"{i}? " + "long " * 100, "answer": "1"} for i in range(2000)]
    file = write(tmp_path / "train.jsonl", *rows)
    command = [sys.executable, "-P", "-m", "zppo", "data", str(file), "--show", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("42", "whole number"),
        ("He has 1,000.\n#### 1,042", "whole number"),
        (r"so $\boxed{\frac{1}{2}}$", "other number"),
        ("(B)", "choice"),
        ("Paris", "words"),
        ("I do not know", "words"),
        (r"x^2 + 1", "mathematics or other text"),
    ],
)
def test_kinds_of_gold_answers(gold: str, kind: str) -> None:
    assert kind_of_gold(gold) == kind


def test_lengths_are_order_statistics() -> None:
    found = lengths_of("tokens", [5, 1, *range(10, 28)], 24)  # 20 of them
    assert msgspec.structs.astuple(found) == ("tokens", 1, 17, 25, 27, 24, 3)


def test_rows_are_shown_from_all_over_the_source() -> None:
    items: Any = list(range(10))
    assert spread(items, 4) == [0, 2, 5, 7] and spread(items, 99) == items


def test_a_picture_is_shown_where_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """Its features, nine tokens with this model, as one mark."""
    folder = ROOT / "examples" / "pictures"
    code, found = figures(capsys, folder / "heldout.jsonl", "--model", folder / "student")
    assert code == 0
    prompt = found["shown"][0]["prompt"]
    seen = "<fake_token_around_image> <global-img> <image> <fake_token_around_image> "
    assert prompt.startswith(f"<bos> <user> {seen}") and prompt.count("<image>") == 1
