"""The command line of suites: the plan, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from zppo import evaluate
from zppo.suites.order import Served, SuiteOrder
from zppo.suites.plan import plan_lines
from zppo.suites.results import RowResult, row_folder, write_result
from zppo.suites.table import Decoding, Row, Suite

SERVER = ["--server", "http://127.0.0.1:8000/v1", "--served-model", "m"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate.main(list(arguments)) == 2
    return capsys.readouterr().err.rstrip("\n")


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paper, out = ["--suite", "paper"], ["--out", str(tmp_path / "o")]
    assert said(capsys, *paper, *SERVER) == (
        "--out is missing; expected a folder for the results, new or begun"
    )
    assert said(capsys, *paper, *out) == (
        "zppo evaluate --suite: expected either checkpoints or --server URL"
    )
    assert said(capsys, *paper, *out, "folder", *SERVER) == (
        "zppo evaluate --suite: expected either checkpoints or --server URL"
    )
    assert said(capsys, *paper, *out, *SERVER[:2]) == (
        "--served-model is missing; expected the name under which --server serves the model"
    )
    assert said(capsys, *paper, *out, *SERVER, "--judge-server", "http://127.0.0.1:1/v1") == (
        "--judge-model is missing; expected the name under which --judge-server serves the judge"
    )
    judge = ["--judge-server", "http://judge.example/v1", "--judge-model", "j"]
    assert said(capsys, *paper, *out, *SERVER, *judge) == (
        "--judge-server.engine_args.base_url is 'http://judge.example/v1', which sends prompts and "
        "the key in the clear; expected https, or --allow-insecure"
    )
    assert evaluate.main([*paper, *out, *SERVER, *judge, "--allow-insecure", "--dry-run"]) == 0
    capsys.readouterr()
    assert said(capsys, *paper, *out, *SERVER, "--harness-python", "lmeval=x") == (
        "--harness-python lmeval=x: expected NAME=PYTHON (did you mean 'lm-eval'?)"
    )
    assert said(capsys, *paper, *out, *SERVER, "--server-arg", "port=1") == (
        "--server-arg port cannot be set: the server listens at a Unix socket of its own"
    )
    assert said(capsys, *paper, *out, *SERVER, "--label", "a", "--label", "b") == (
        "--label is given 2 times; expected once for each of the 1 models"
    )
    assert said(capsys, *paper, *out, *SERVER, "--label", "suite.html") == (
        "--label: 'suite.html' cannot be the name of a folder in --out; expected another, of at "
        "most 200 bytes"
    )
    assert said(capsys, *paper, *out, *SERVER, "--label", "é" * 101).startswith("--label: 'éé")
    assert said(capsys, "--suite", "video2", *out, *SERVER) == (
        "--suite is 'video2'; expected paper, llm, vlm, video or a YAML file (did you mean "
        "'video'?)"
    )
    assert not (tmp_path / "o").exists()


def test_the_plan_of_the_paper(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("zppo.suites.plan.TOKEN_FILE", tmp_path / "none")
    out = ["--out", str(tmp_path / "o")]
    dry = ["--suite", "llm", *out, *SERVER, "--dry-run", "--tokens-per-second", "20000"]
    assert evaluate.main(dry) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "suite llm: 10 benchmarks, 7 can be run"
    assert lines[1] == "  AIME25    lm-eval, 30 questions, at most 368,640 tokens"
    assert lines[4] == (
        "  GPQA-D    missing: gated set: accept the terms of Idavidrein/gpqa, then set HF_TOKEN"
    )
    questions = 30 + 30 + 1346 + 400 + 14_042 + 12_032 + 5_700
    assert lines[-2] == f"m: 0 done, 7 to run, at most {questions * 12_288:,} tokens"
    assert lines[-1] == "  at most 5.7 hours at 20,000 tokens a second"
    assert not (tmp_path / "o").exists()


def order(tmp_path: Path) -> SuiteOrder:
    rows = [
        Row(short=short, family="F", harness="lmms-eval", scoring="E+J", task=[task], questions=100)
        for short, task in [("A", "a"), ("B", "b"), ("EN", "ocr"), ("ZH", "ocr")]
    ]
    suite = Suite(name="s", folder="", decoding=Decoding(max_new_tokens=1000), rows=rows)
    return SuiteOrder(
        suite=suite, models=[Served(label="m", model="m")], judge=None, harness_pythons={},
        out=str(tmp_path), limit=None, concurrent=1, seed=0, timeout_seconds=1, retry_seconds=1,
        startup_seconds=1, server_args={}, templates=None, baseline=None,
    )  # fmt: skip


def test_rows_that_are_done_measure_the_rest(tmp_path: Path) -> None:
    """100 answers of 50 tokens took 10 s; parts of one task are asked once."""
    folder = row_folder(tmp_path, "m", "A")
    folder.mkdir(parents=True)
    scores = {str(i): 1.0 for i in range(100)}
    done = RowResult(
        short="A", settings={}, harness="lmms-eval 0.7.3", scores=scores, judged=0, unboxed=0,
        cut_off=0, refused=0, tokens=5000, seconds=10.0, asked=100,
    )  # fmt: skip
    write_result(folder, done)
    lines = plan_lines(order(tmp_path), {}, None)
    assert lines[-2:] == [
        "m: 1 done, 3 to run, at most 200,000 tokens; about 10,000 at the 50 per answer so far",
        "  about 0.0 hours at 500 tokens a second",
    ]


def test_without_a_speed_the_time_is_not_known(tmp_path: Path) -> None:
    known, said = order(tmp_path), "  how long that takes is not known: "
    assert plan_lines(known, {}, None)[-1] == said + "give --tokens-per-second"
    rows = [replace(row, questions=None) for row in known.suite.rows]
    unknown = replace(known, suite=replace(known.suite, rows=rows))
    assert plan_lines(unknown, {}, 100.0)[-1] == said + "the table counts no questions"


def test_an_order_travels_as_json(tmp_path: Path) -> None:
    one = order(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(one), type=SuiteOrder) == one
