"""The evaluating process: real processes, real grading, scripted and real engines."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import make_model, make_tokenizer
from openai_server import MODEL, Server, running, status

from zppo.config.topology import ActorConfig, DataConfig, ModelConfig, ResponseSampling
from zppo.data.question import Question
from zppo.evaluation.order import EvaluationOrder, served_as
from zppo_actors.evaluator.evaluator import Evaluator, Grading
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples

pytestmark = pytest.mark.slow
QUICKSTART = Path(__file__).parents[3] / "examples/quickstart"
LIMIT = 600


def write_set(folder: Path, script: dict[str, Any], count: int = 12) -> list[str]:
    """Questions `0 + 1?` and so on, a script for the simulated engine, and the options that use
    both."""
    rows = [{"id": f"q{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(count)]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "script.json").write_text(json.dumps(script))
    options = (
        f"--model sim --engine simulated --engine-arg script={folder / 'script.json'} --data "
        "set.jsonl"
    )
    return options.split()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "zppo.evaluate", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    with start(folder, *arguments) as process:
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_report_counts_what_the_script_says(tmp_path: Path) -> None:
    right = {f"{i} + 1?": {"answer": str(i + 1), "accuracy": float(i < 9)} for i in range(12)}
    options = write_set(tmp_path, {"questions": right, "default": {"tokens": 4}})
    code, out, err = run(tmp_path, *options, "--samples", "2", "--out", "by.jsonl", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["pass_at_1"]["value"] == report["pass_at"]["2"]["value"] == 0.75
    assert 0.4 < report["pass_at_1"]["low"] < 0.75 < report["pass_at_1"]["high"] <= 1.0
    assert (report["questions"], report["samples"], report["failed"], report["unanswered"]) == (
        12,
        2,
        0,
        0.0,
    )
    assert "the engine 'simulated' knows no presence penalty" in report["notes"]
    by_question = {line["id"]: line for line in lines(tmp_path / "by.jsonl")}
    assert (
        len(by_question) == 12
        and by_question["q3"]["mean"] == 1.0
        and by_question["q11"]["mean"] == 0.0
    )
    assert by_question["q3"]["responses"][0]["answer"] == "4"


def test_the_same_seed_gives_the_same_answers_whatever_the_company(tmp_path: Path) -> None:
    options = write_set(tmp_path, {"default": {"answer": "1", "wrong": ["2", "3", "4"]}})
    run(tmp_path, *options, "--out", "all.jsonl", "--seed", "3")
    run(
        tmp_path,
        *options,
        "--out",
        "few.jsonl",
        "--seed",
        "3",
        "--limit",
        "5",
        "--engine-arg",
        "max_sequences=4",
    )
    every = {line["id"]: line["responses"] for line in lines(tmp_path / "all.jsonl")}
    few = {line["id"]: line["responses"] for line in lines(tmp_path / "few.jsonl")}
    assert len(few) == 5 and all(every[name] == responses for name, responses in few.items())


def test_a_question_that_cannot_be_asked_stops_the_evaluation_and_keeps_what_is_known(
    tmp_path: Path,
) -> None:
    options = write_set(tmp_path, {"questions": {"11 + 1?": {"fail": "the server is down"}}})
    code, out, err = run(tmp_path, *options, "--out", "by.jsonl", "--engine-arg", "max_sequences=4")
    assert (code, out) == (1, "")
    assert err == (
        "the question 'q11' could not be asked: the server is down; what was answered is in "
        "by.jsonl\n"
    )
    assert 0 < len(lines(tmp_path / "by.jsonl")) < 12


def test_the_judge_decides_what_the_rule_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(
        '{"id": "a", "question": "Which city?", "answer": "Paris"}\n'
    )
    script = {"default": {"answer": "the capital of France", "accuracy": 1.0, "tokens": 2}}
    (tmp_path / "script.json").write_text(json.dumps(script))
    options = f"--model sim --judge sim --engine simulated --engine-arg script={tmp_path / 'script.json'}".split()
    code, out, err = run(
        tmp_path, *options, "--data", "set.jsonl", "--grader", "judge", "--json", "--samples", "1"
    )
    assert code == 0, err
    report = json.loads(out)
    assert (report["judged"], report["pass_at_1"]["value"]) == (
        1,
        0.0,
    )  # the scripted judge replies with no JSON


def test_ctrl_c_leaves_whole_lines_and_no_process(tmp_path: Path) -> None:
    slow = {"questions": {"11 + 1?": {"hang": True}}}
    options = write_set(tmp_path, slow)
    with start(tmp_path, *options, "--out", "by.jsonl") as process:
        while process.poll() is None and not (
            (tmp_path / "by.jsonl").exists()
            and len((tmp_path / "by.jsonl").read_text().splitlines()) == 11
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (130, "")
    assert err == "stopped; what was answered is in by.jsonl\n"
    assert len(lines(tmp_path / "by.jsonl")) == 11


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="the package reasoning-gym is not installed",
)
def test_procedural_questions_are_graded_by_their_own_rule_in_the_worker(tmp_path: Path) -> None:
    options = write_set(tmp_path, {"default": {"answer": "1", "accuracy": 1.0}})[:-1]
    source = "reasoning_gym:gcd?size=20&max_value=30"
    code, out, err = run(
        tmp_path, *options, source, "--samples", "1", "--out", "by.jsonl", "--json"
    )
    assert code == 0, err
    results = lines(tmp_path / "by.jsonl")
    assert [line["mean"] for line in results] == [float(line["gold"] == "1") for line in results]
    assert json.loads(out)["pass_at_1"]["value"] == pytest.approx(
        sum(line["mean"] for line in results) / 20
    )
    assert 0 < sum(line["mean"] for line in results) < 20


def test_an_engine_argument_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    options = write_set(tmp_path, {})
    code, out, err = run(tmp_path, *options, "--engine-arg", "max_sequence=3")
    assert (code, out) == (2, "")
    assert (
        err
        == "--model.engine_args.max_sequence: unknown engine argument (did you mean 'max_sequences'?)\n"
    )


def test_a_real_model_with_the_decoding_of_the_paper(tmp_path: Path) -> None:
    make_model(initializer_range=0.3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"w{i} w{i + 1}", "answer": "1"} for i in range(3, 8)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--model model --data set.jsonl --max-new-tokens 12 --samples 3 --out by.jsonl"
    code, out, err = run(tmp_path, *options.split())
    assert code == 0, err
    assert out.startswith("model on set.jsonl: 5 questions, 3 samples each\n  pass@1    0.0 %")
    assert len(lines(tmp_path / "by.jsonl")) == 5


@pytest.mark.skipif(not QUICKSTART.is_dir(), reason="the quickstart's models are not here")
def test_the_teacher_of_the_quickstart_beats_its_student(tmp_path: Path) -> None:
    options = (
        f"--data {QUICKSTART / 'heldout.jsonl'} --templates {QUICKSTART / 'templates'} --limit 48 "
        "--json"
    )
    options += " --max-new-tokens 24 --temperature 1 --top-p 1 --top-k 0 --presence-penalty 0"
    accuracy = {}
    for name in ("student", "teacher"):
        code, out, err = run(tmp_path, "--model", str(QUICKSTART / name), *options.split())
        assert code == 0, err
        accuracy[name] = json.loads(out)["pass_at_1"]["value"]
    assert accuracy["student"] + 0.2 < accuracy["teacher"]


def test_a_server_is_asked_with_the_decoding_of_the_paper(tmp_path: Path) -> None:
    write_set(tmp_path, {}, count=5)
    with running(Server()) as server:
        options = (
            f"--server {server.base_url} --served-model {MODEL} --data set.jsonl --samples 2 --out "
            "by.jsonl --json"
        )
        code, out, err = run(tmp_path, *options.split())
    assert code == 0, err
    report = json.loads(out)
    assert (report["model"], report["questions"]) == (f"{MODEL} at {server.base_url}", 5)
    assert len(lines(tmp_path / "by.jsonl")) == len(server.requests) == 5
    sent = server.requests[0].body
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["presence_penalty"]) == (
        0.6,
        0.95,
        20,
        1.5,
    )
    assert (sent["max_tokens"], sent["n"]) == (12_288, 2)


def test_a_server_that_refuses_everything_stops_the_evaluation(tmp_path: Path) -> None:
    write_set(tmp_path, {})
    with running(Server()) as server:
        server.default = status(400, "no such parameter")
        options = f"--server {server.base_url} --served-model {MODEL} --data set.jsonl --samples 2"
        code, out, err = run(tmp_path, *options.split(), "--engine-arg", "max_concurrent=2")
    assert (code, out) == (1, "") and err.count("\n") == 1, err
    assert err.startswith("none of the first 3 questions could be asked: ") and err.endswith(
        "; nothing was written\n"
    )


class FixedReply:
    """A judge that always says the same."""

    capacity, policy_version, progress, broken = 4, -1, 0, None

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.asked: list[str] = []

    async def generate(self, task: GenerateTask, finished: object = None) -> GroupSamples:
        self.asked.append(task.prompt.messages[-1].content)
        empty = np.zeros(0, np.int32)
        return GroupSamples(
            prompt_ids=empty,
            token_ids=empty,
            log_probs=np.zeros(0, np.float32),
            offsets=np.zeros(2, np.int32),
            version_spans=np.zeros((0, 2), np.int32),
            texts=[self.reply],
            finish_reasons=["stop"],
        )


@pytest.mark.parametrize(
    ("text", "reply", "reward", "asks"),
    [
        (r"\boxed{the city of Paris}", '{"verdict": "correct"}', 1.0, True),
        (r"\boxed{the city of Paris}", '{"verdict": "wrong"}', 0.0, True),
        (r"\boxed{the city of Paris}", "certainly correct", 0.0, True),
        (r"\boxed{Paris}", '{"verdict": "wrong"}', 1.0, False),
        ("Paris", '{"verdict": "correct"}', 0.0, False),
    ],
)
def test_the_judge_has_the_last_word_on_boxed_answers_only(
    text: str, reply: str, reward: float, asks: bool
) -> None:
    model = ModelConfig(model="m", sampling=ResponseSampling(max_new_tokens=8))
    served = served_as("--model", model, ActorConfig(engine="openai"))
    order = EvaluationOrder(
        label="m", data=DataConfig(train="x.jsonl"), served=served, judge=served, samples=1
    )
    question = Question(id="q", text="Which city?", answer="Paris", grader="exact")
    judge, engine = FixedReply(reply), FixedReply(text)
    with Grading(5.0, "x.jsonl") as grading:
        report = asyncio.run(Evaluator(order, engine, judge, grading, None).run([question]))  # type: ignore[arg-type]
    assert report.pass_at_1.value == reward and bool(judge.asked) == asks == bool(report.judged)
    assert report.tokens_per_response is None
    assert all("<candidate>\nthe city of Paris\n</candidate>" in prompt for prompt in judge.asked)
    assert all("Which city?" in prompt for prompt in judge.asked)
