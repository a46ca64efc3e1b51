"""The maker of teachers: what is in the loss, that packing changes nothing, what is refused, and
that it teaches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_teacher as tool  # noqa: E402

from zppo.errors import UserError  # noqa: E402
from zppo.prompting.prompts import PromptSet  # noqa: E402

WORLD = ROOT / "examples" / "quickstart"
LESSONS = [
    tool.Lesson([1, 2, 3], [4, 5]),
    tool.Lesson([1, 2], [6, 7, 8]),
    tool.Lesson([9, 9, 9, 9], [10]),
]


@pytest.fixture(scope="module")
def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(WORLD / "student", dtype=torch.float32).eval()


def write_lessons(path: Path, count: int = 8) -> Path:
    rows = [
        {"id": str(i), "question": f"{i} * 2 mod 23", "solution": f"\\boxed{{ {2 * i % 23} }}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- lessons -------------------------------------------------------------------------------------


def test_rows_are_read_up_to_the_limit_and_other_columns_ignored(tmp_path: Path) -> None:
    rows = tool.read_rows(write_lessons(tmp_path / "lessons.jsonl"), 3)
    assert [row.question for row in rows] == ["0 * 2 mod 23", "1 * 2 mod 23", "2 * 2 mod 23"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{"question": "a", "solution": "b"}\n{"question": "a"}\n',
            "lessons.jsonl:2: Object missing required field `sol",
        ),
        ("not json\n", "lessons.jsonl:1: JSON is malformed"),
        ("", "lessons.jsonl holds no lessons"),
    ],
)
def test_broken_lessons_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "lessons.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        tool.read_rows(path, None)


def test_lessons_begin_as_in_a_run_and_end_with_the_end_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student")
    rows = tool.read_rows(write_lessons(tmp_path / "lessons.jsonl"), None)
    lesson = tool.encode(rows, tokenizer, PromptSet(WORLD / "templates"))[5]
    assert (
        tokenizer.decode(lesson.prompt)
        == "<bos> <user> 5 * 2 mod 23 ? answer in \\boxed{ } <assistant>"
    )
    assert tokenizer.decode(lesson.solution) == "\\boxed{ 10 } <eos>"


def test_packing_keeps_the_order_and_the_width() -> None:
    assert tool.pack(LESSONS, 10) == [LESSONS[:2], LESSONS[2:]]
    assert tool.pack(LESSONS, 2) == [[lesson] for lesson in LESSONS]  # longer lessons go alone
    assert tool.pack(LESSONS, 100) == [LESSONS]


def test_only_solutions_are_labels() -> None:
    batch = tool.collate([LESSONS[:2], LESSONS[2:]])
    none = tool.IGNORED
    assert batch.labels_BL.tolist() == [
        [none, none, 4, 5, none, none, 6, 7, 8, none],
        [none, none, none, 10, none, none, none, none, none, none],
    ]
    assert batch.positions_BL.tolist()[0] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert batch.ends_BL.tolist() == [[5] * 5 + [10] * 5, [5] * 5 + [10] * 5]


def test_packed_loss_is_the_sum_of_the_single_losses(student: Any) -> None:
    with torch.no_grad():
        packed = tool.solution_loss(student, tool.collate([LESSONS]))
        single = sum(tool.solution_loss(student, tool.collate([[lesson]])) for lesson in LESSONS)
        plain = torch.zeros(())
        for prompt, solution in LESSONS:
            log_probs = student(torch.tensor([prompt + solution])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(solution) - 1)
            plain -= sum(
                log_probs[place, token] for place, token in zip(places, solution, strict=True)
            )
    torch.testing.assert_close(packed, single)
    torch.testing.assert_close(packed, plain)


# ---- the schedule --------------------------------------------------------------------------------


def test_every_pass_sees_every_lesson_once() -> None:
    lessons = [tool.Lesson([index], [0]) for index in range(6)]
    recipe = tool.Recipe(epochs=2, batch_lessons=4)
    batches = list(tool.updates_of(lessons, recipe))
    seen = [lesson.prompt[0] for batch in batches for lesson in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_a_fraction_of_a_pass_is_at_least_one_update() -> None:
    batches = list(tool.updates_of(LESSONS, tool.Recipe(epochs=0.1, batch_lessons=4)))
    assert [len(batch) for batch in batches] == [4]


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    recipe = tool.Recipe(learning_rate=1.0, warmup=0.1)
    rates = [tool.learning_rate(recipe, update, 100) for update in range(100)]
    top = int(np.argmax(rates))
    assert 8 <= top <= 11
    assert rates[0] < 0.11
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


# ---- the command ---------------------------------------------------------------------------------


def run(tmp_path: Path, *more: str) -> int:
    lessons = write_lessons(tmp_path / "lessons.jsonl")
    command = [
        "--model",
        str(WORLD / "student"),
        "--lessons",
        str(lessons),
        "--out",
        str(tmp_path / "made"),
    ]
    return tool.main([*command, "--templates", str(WORLD / "templates"), *more])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_teaches_and_the_folder_opens_with_plain_transformers(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--epochs", "30", "--batch-lessons", "8", "--learning-rate", "3e-3", "--dtype", dtype]
    assert run(tmp_path, *more) == 0
    assert "update 30/30  loss " in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert str(model.dtype) == f"torch.{dtype}"
    prompt = tokenizer(
        "<bos> <user> 7 * 2 mod 23 ? answer in \\boxed{ } <assistant>", return_tensors="pt"
    )
    answer = model.generate(prompt["input_ids"], max_new_tokens=8, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer) == "\\boxed{ 14 } <eos>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lessons.jsonl", "made"]


@pytest.mark.slow
def test_a_seed_gives_the_same_weights(student: Any, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, "--epochs", "2", "--batch-lessons", "4", "--threads", "1") == 0
        made.append((tmp_path / name / "made" / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert made[0] != (WORLD / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_accuracy_is_told_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = tmp_path / "heldout.jsonl"
    rows = [
        {"id": str(i), "question": f"{i} * 2 mod 23", "answer": str(2 * i % 23)} for i in range(8)
    ]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        "--heldout",
        str(heldout),
        "--max-new-tokens",
        "24",
        "--epochs",
        "30",
        "--batch-lessons",
        "8",
    ]
    assert run(tmp_path, *more, "--learning-rate", "3e-3", "--dtype", "float32") == 0
    told = capsys.readouterr().out
    assert "before: " in told
    assert "after: 100.0 % (95 % interval 100.0 to 100.0) of 8 held-out questions, greedy" in told


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--epochs", "0"], "--epochs: is 0.0; expected a number above 0"),
        (["--learning-rate", "-1"], "--learning-rate: is -1.0; expected a number above 0"),
    ],
)
def test_senseless_numbers_are_refused(
    tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *more) == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="argument --learning-rate: 'nan' is not a number; see "):
        run(tmp_path, "--learning-rate", "nan")


def test_folder_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made").mkdir()
    assert run(tmp_path) == 2
    assert (
        capsys.readouterr().err
        == f"--out: {tmp_path / 'made'} exists already; expected a new folder\n"
    )


def test_folder_that_is_no_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons = write_lessons(tmp_path / "lessons.jsonl")
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "made")
    assert (
        tool.main(["--model", str(tmp_path / "empty"), "--lessons", str(lessons), "--out", out])
        == 2
    )
    assert "--model: " in capsys.readouterr().err
