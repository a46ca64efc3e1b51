"""The door of an evaluation: what it orders, and one sentence for each mistake before anything is
started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo import evaluate
from zppo.config import load as topologies
from zppo.config.topology import ResponseSampling
from zppo.evaluation.order import PAPER_SAMPLING, EvaluationOrder
from zppo.evaluation.report import Answered, QuestionResult, Tally, pass_at_k
from zppo.records import checkpoint, run_directory

Start = Callable[..., tuple[EvaluationOrder | None, str]]


class Started(Exception):
    """Stands for the evaluating process taking over."""

    def __init__(self, order: EvaluationOrder) -> None:
        self.order = order


@pytest.fixture
def start(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Start:
    """Call the door; returns the order it gave (or None) and what it said on stderr."""

    def take_over(file: str, command: list[str]) -> None:
        assert command[1:5] == ["-P", "-m", "zppo_actors", "evaluate"]
        raise Started(msgspec.json.decode(command[5], type=EvaluationOrder))

    monkeypatch.setattr(os, "execv", take_over)

    def start(*arguments: str) -> tuple[EvaluationOrder | None, str]:
        order = None
        try:
            assert evaluate.main(arguments) == 2
        except Started as started:
            order = started.order
        return order, capsys.readouterr().err.replace(f"{small}/", "")

    return start


def make_run(small: Path, steps: int = 3, *settings: str) -> Path:
    """A run directory with one whole checkpoint."""
    run = small / "small-run"
    run_directory.create(
        run,
        topologies.load(
            small / "topology.yaml",
            ["data.heldout=train.jsonl", "student.dtype=bfloat16", *settings],
        ),
    )
    partial = checkpoint.begin(run, steps)
    (small / "student").rename(partial / "model")
    checkpoint.commit(run, steps)
    return run


def test_code_that_a_run_names_is_not_imported(start: Start, small: Path) -> None:
    (small / "own.py").write_text("raise SystemExit(7)\n")
    run = make_run(small, 3, "data.heldout=./own.py:rows")
    order, said = start("--model", str(run))
    assert order is None
    assert said == (
        "--data is missing; expected a source, because the run holds out 'own.py:rows', whose code "
        "is not run here unless --data names it\n"
    )


# ---- orders --------------------------------------------------------------------------------------


def test_a_processor_that_is_slow_in_bfloat16_is_told_of(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "this processor has no AVX-512 and is some 50 times slower in bfloat16 than in float32: "
        "give --dtype float32"
    )
    call = ("--model", "student", "--data", "train.jsonl")
    for fast in ("float32", "bfloat16"):
        monkeypatch.setattr("zppo.evaluate.cpu_dtype", lambda fast=fast: fast)
        for dtype in ("float32", "bfloat16"):
            order, _ = start(*call, "--dtype", dtype)
            assert order is not None
            assert (said in order.notes) == ((fast, dtype) == ("float32", "bfloat16"))
    order, _ = start(*call, "--dtype", "bfloat16", "--device", "cuda")
    assert order is not None and said not in order.notes


def test_pictures_that_are_not_shown_are_said(start: Start, small: Path) -> None:
    rows = [{"id": f"{i}", "question": f"{i} + 1?", "answer": i + 1} for i in range(3)]
    text = "".join(json.dumps({**row, "picture": "a.png"}) + "\n" for row in rows)
    (small / "pictured.jsonl").write_text(text)
    for limit, asked in (("1", "1 question is"), ("9", "3 questions are")):
        order, _ = start("--model", "student", "--data", "pictured.jsonl", "--limit", limit)
        assert order is not None and order.notes[-1] == (
            f"pictured.jsonl: {asked} asked without the picture or video of the column 'picture'; "
            "name it in data.fields (images or videos), or leave it out of the file"
        )


def test_a_model_folder_is_asked_as_in_the_paper(start: Start, small: Path) -> None:
    order, said = start("--model", "student", "--data", "train.jsonl")
    assert order is not None and said == ""
    assert (
        order.served.model.model == str(small / "student")
        and order.served.actor.engine == "transformers"
    )
    assert order.served.model.dtype == "float32" and order.samples == 4
    assert order.served.model.sampling == msgspec.structs.replace(PAPER_SAMPLING, max_new_tokens=63)
    assert order.notes == [
        (
            "responses have at most 63 tokens less the prompt's, the context of the model, instead "
            "of 12288"
        )
    ]


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float64", "text_config": {}}, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_model_or_of_its_text_half(
    changes: dict[str, Any], dtype: str, start: Start, small: Path
) -> None:
    path = small / "student/config.json"
    config = json.loads(path.read_text())
    if "text_config" in changes:
        changes = {**changes, "text_config": config | {"dtype": None} | changes["text_config"]}
    path.write_text(json.dumps(config | changes))
    order, said = start("--model", "student", "--data", "train.jsonl")
    assert order is not None, said
    assert order.served.model.dtype == dtype


def test_options_change_the_decoding(start: Start) -> None:
    options = (
        "--max-new-tokens 8 --temperature 0 --top-p 1 --top-k 0 --presence-penalty 0 --samples 2 "
        "--seed 5"
    )
    order, _ = start(
        "--model",
        "student",
        "--data",
        "train.jsonl",
        *options.split(),
        "--engine-arg",
        "max_sequences=9",
    )
    assert order is not None and order.served.model.sampling == ResponseSampling(
        max_new_tokens=8, temperature=0.0
    )
    assert (order.samples, order.seed, order.served.actor.engine_args) == (
        2,
        5,
        {"max_sequences": 9},
    )


def test_variables_of_the_chat_template(start: Start) -> None:
    base = ("--model", "student", "--data", "train.jsonl")
    order, _ = start(
        *base, "--chat-template-arg", "enable_thinking=false", "--chat-template-arg", "effort=low"
    )
    assert order is not None
    assert order.served.model.chat_template_kwargs == {"enable_thinking": False, "effort": "low"}
    order, said = start(*base, "--chat-template-arg", "effort=[1]")
    assert order is None
    assert (
        said
        == "--chat-template-arg.effort is [1]; expected true, false, a number, a text or null\n"
    )


def test_a_run_brings_its_checkpoint_questions_and_prompts(start: Start, small: Path) -> None:
    run = make_run(small)
    order, said = start("--model", str(run))
    assert order is not None, said
    folder = run / "checkpoints/step-3/model"
    assert order.served.model.model == str(folder) and order.served.model.dtype == "bfloat16"
    assert order.data.train == str(small / "train.jsonl") and str(folder) in order.notes


def test_a_checkpoint_is_verified(start: Start, small: Path) -> None:
    folder = make_run(small) / "checkpoints/step-3"
    order, _ = start("--model", str(folder))
    assert order is not None and order.served.model.model == str(folder / "model")
    (folder / "model/tokenizer.json").write_text("{} ")
    order, said = start("--model", str(folder))
    assert order is None and said.startswith(
        f"{folder.relative_to(small)}: not a whole checkpoint: model/tokenizer.json"
    )


def test_a_server_is_named_by_address_and_model(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server = ("--server", "http://127.0.0.1:8000/v1", "--served-model", "big")
    order, _ = start(*server, "--data", "train.jsonl", "--engine-arg", "max_concurrent=3")
    assert (
        order is not None
        and order.served.actor.engine == "openai"
        and order.label == "big at http://127.0.0.1:8000/v1"
    )
    assert order.served.actor.engine_args == {
        "base_url": "http://127.0.0.1:8000/v1",
        "max_concurrent": 3,
    }
    assert b"secret-key" not in msgspec.json.encode(order)


def test_a_judge_is_another_model(start: Start) -> None:
    order, _ = start(
        "--model", "student", "--data", "train.jsonl", "--grader", "judge", "--judge", "teacher"
    )
    assert order is not None and order.judge is not None
    assert (
        order.judge.model.model.endswith("/teacher")
        and order.judge.model.sampling.temperature == 0.0
    )


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "zppo evaluate: expected either --model FOLDER or --server URL"),
        (
            "--model student --server http://x",
            "zppo evaluate: expected either --model FOLDER or --server URL",
        ),
        (
            "--model student",
            (
                "--data is missing; expected a question file, a data set folder, or "
                "reasoning_gym:TASK?…"
            ),
        ),
        (
            "--model studnet --data train.jsonl",
            "--model: there is no model folder 'studnet' (did you mean 'student'?)",
        ),
        (
            "--model student --data tran.jsonl",
            "tran.jsonl: no such question file (did you mean 'train.jsonl'?)",
        ),
        (
            "--model student --data train.jsonl --temperature 1e-9",
            "--temperature is 1e-09; expected 0, which is greedy, or at least 0.001, because logits "
            "are divided by it",
        ),
        (
            "--model student --data train.jsonl --temperature -1",
            "--temperature is -1.0; expected `float` >= 0.0",
        ),
        (
            "--model student --data train.jsonl --seed -1",
            "zppo evaluate: argument --seed: '-1' is not a whole number of at least 0; see ",
        ),
        (
            "--model student --data train.jsonl --seed 9223372036854775808",
            "zppo evaluate: argument --seed: '9223372036854775808' is not a whole number from 0 to "
            "9223372036854775807; see zppo evaluate --help",
        ),
        (
            "--model student --data train.jsonl --max-bad-rows -1",
            "zppo evaluate: argument --max-bad-rows: '-1' is not a whole number of at least 0; see",
        ),
        (
            "--model student --data train.jsonl --top-p nan",
            "zppo evaluate: argument --top-p: 'nan' is not a number; see zppo evaluate --help",
        ),
        (
            "--model student --data train.jsonl --threads 1025",
            "zppo evaluate: argument --threads: '1025' is not a whole number from 1 to 1024; see ",
        ),
        ("--model student --data train.jsonl --top-p 2", "--top-p is 2.0; expected `float` <= 1.0"),
        (
            "--model student --data train.jsonl --samples 0",
            (
                "zppo evaluate: argument --samples: '0' is not a whole number of at least 1; see "
                "zppo evaluate --help"
            ),
        ),
        (
            "--model student --data train.jsonl --grader mth",
            "data.grader: unknown grader 'mth' (did you mean 'math'?)",
        ),
        (
            "--model student --data train.jsonl --grader judge",
            "--grader is 'judge'; expected a judge as well: --judge FOLDER or --judge-server URL",
        ),
        (
            "--model student --data train.jsonl --out train.jsonl",
            "--out: 'train.jsonl' exists already; name another",
        ),
        ("--model student --data train.jsonl --out no/x.jsonl", "--out: there is no folder 'no'"),
        (
            "--model student --data train.jsonl --engine-arg x",
            "--engine-arg x: expected NAME=VALUE",
        ),
        (
            "--server http://127.0.0.1:1/v1 --data train.jsonl",
            "--served-model is missing; expected the name under",
        ),
        (
            "--server ftp://x --served-model m --data train.jsonl",
            "--server.engine_args.base_url is 'ftp://x'; expected",
        ),
        (
            "--server http://there.example/v1 --served-model m --data train.jsonl",
            "--server.engine_args.base_url is 'http://there.example/v1', which sends prompts and "
            "the key in the clear; expected https, or --allow-insecure\n",
        ),
        (
            "--server http://127.0.0.1:1 --served-model m --engine vllm --data train.jsonl",
            "--engine is 'vllm'; expected none, because --server has its own",
        ),
        ("--model student --data train.jsonl --field answr=a", "--field: "),
        (
            "--model student --data train.jsonl --templates nowhere",
            "data.templates: nowhere is not a folder; expected",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_start_nothing(
    start: Start, arguments: str, sentence: str
) -> None:
    order, said = start(*arguments.split())
    assert order is None
    assert said.startswith(sentence) and said.count("\n") == 1


def test_servers_on_other_machines_over_http_where_it_is_allowed(start: Start) -> None:
    arguments = (
        "--server http://there.example/v1 --served-model m --data train.jsonl --grader judge"
    )
    judge = "--judge-server http://judge.example/v1 --judge-model j --allow-insecure"
    order, _ = start(*arguments.split(), *judge.split())
    assert order is not None and order.judge is not None
    for one in (order.served, order.judge):
        assert one.actor.engine_args["allow_insecure"] is True


def test_a_run_without_checkpoint_is_refused(start: Start, small: Path) -> None:
    run_directory.create(small / "small-run", topologies.load(small / "topology.yaml"))
    assert start("--model", "small-run") == (
        None,
        "--model: the run 'small-run' has no whole checkpoint yet\n",
    )


def test_a_run_with_rewards_of_its_own_needs_a_grader(start: Start, small: Path) -> None:
    """Their code is not run because a run directory names it."""
    (small / "mine.py").write_text("def f(question, response, row): ...\n")
    make_run(small, 3, "data.reward=[{use: ./mine.py:f}]")
    (small / "mine.py").write_text("raise SystemExit('it was imported')\n")
    order, said = start("--model", "small-run")
    assert order is None and said == (
        "--grader is missing; expected math, exact or choice, because the run has rewards "
        "(mine.py:f), whose code is not run here\n"
    )
    order, _ = start("--model", "small-run", "--grader", "exact")
    assert order is not None and (order.data.reward, order.data.grader) == ([], "exact")


def test_bad_rows_are_refused_as_in_a_run(start: Start, small: Path) -> None:
    with (small / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "no answer"}) + "\n")
    order, said = start("--model", "student", "--data", "train.jsonl")
    assert order is None and said.startswith("train.jsonl:7: the gold answer ('answer') is missing")
    order, _ = start("--model", "student", "--data", "train.jsonl", "--max-bad-rows", "1")
    assert order is not None


# ---- numbers -------------------------------------------------------------------------------------


def result(rewards: list[float], **changes: object) -> QuestionResult:
    responses = [
        Answered(text="", reward=r, answer="1", note="", finish_reason="stop", tokens=3)
        for r in rewards
    ]
    return QuestionResult(id="q", question="?", gold="1", responses=responses, mean=0.0, **changes)  # type: ignore[arg-type]


def test_pass_at_1_is_the_mean_and_pass_at_n_asks_for_one() -> None:
    tally = Tally(samples=4)
    for rewards in ([1.0, 0, 0, 0], [1.0, 1, 1, 1], [0.0, 0, 0, 0]):
        tally.add(result(rewards), "timed out")
    assert tally.pass_at_1().value == pytest.approx(5 / 12)
    assert list(tally.pass_at()) == ["2", "4"]
    assert tally.pass_at()["2"].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert tally.pass_at()["4"].value == pytest.approx(2 / 3)
    interval = tally.pass_at_1()
    assert interval.low == pytest.approx(max(0.0, 5 / 12 - 1.96 * 0.5204 / 3**0.5), abs=1e-3)


def test_a_question_that_could_not_be_asked_counts_as_wrong() -> None:
    tally = Tally(samples=2)
    tally.add(result([1.0, 1.0]), "timed out")
    tally.add(result([], failed="too long"), "timed out")
    assert tally.pass_at_1().value == 0.5 and tally.failed == 1


@given(st.integers(1, 30), st.data())
def test_pass_at_k_grows_with_k_and_with_right_answers(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = pass_at_k(n, right, k)
    assert pass_at_k(n, right, 1) == pytest.approx(right / n)
    assert 0.0 <= value <= 1.0 and value >= right / n - 1e-12
    assert pass_at_k(n, right, n) == float(right > 0)
