"""Real runs that learn nothing: each ends with a verdict that says why; `zppo doctor` agrees."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai_server as fake
import pytest
from openai_server import MODEL, Request, Server, running

from zppo.records import checkpoint

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
PATIENCE = 900.0
SMALL = {
    "run.steps": 40,
    "scheduler.new_questions": 8,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.engine_args.max_sequences": 32,
}

pytestmark = pytest.mark.slow


def launch(directory: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "zppo.launch", "--topology", str(QUICKSTART)]
    for name, value in {**SMALL, "run.directory": directory, **settings}.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def doctor(directory: Path) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "zppo", "doctor", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, json.loads(done.stdout)


def severe(report: dict[str, Any]) -> list[str]:
    return [found["rule"] for found in report["advice"] if found["severity"] == "severe"]


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr, notes on the topology left out."""
    return [line for line in done.stderr.splitlines() if not line.startswith("note: ")]


def test_a_teacher_that_falls_silent_ends_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with running(Server()) as server:
        dead = threading.Event()

        async def dies_after_the_first_step(request: Request, writer: asyncio.StreamWriter) -> None:
            metrics = directory / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                dead.set()
            answer = fake.status(500, said="gone") if dead.is_set() else fake.good()
            await answer(request, writer)

        server.default = dies_after_the_first_step
        arguments = json.dumps({"base_url": server.base_url, "retry_budget": 0})
        teacher = {
            "actors.teacher.engine": "openai",
            "teacher.model": MODEL,
            "actors.teacher.engine_args": arguments,
        }
        done = launch(directory, **teacher)
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = said(done)[0]
    assert verdict.startswith("teacher answered none of its ") and (
        " tasks in 3 windows in a row (run.silent_teacher_windows: 3; 0 goes on without it); see "
        "logs/teacher-0.log: " in verdict
    )
    code, report = doctor(directory)
    assert code == 1 and "teacher_silent" in severe(report)
    assert report["verdict"] == verdict
    assert checkpoint.find_latest(directory).step == report["steps"]
    assert f"continue: zppo launch --resume {directory}" in done.stderr


def test_answers_that_are_cut_off_end_the_run_where_advice_may_stop_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    sick = {"method.name": "grpo", "student.sampling.max_new_tokens": 2, "run.on_advice": "stop"}
    done = launch(directory, **sick)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said(done)[0] == (
        "severe cut_off: 100 % of the last responses were cut off at the length limit; raise "
        "student.sampling.max_new_tokens, or let the student think less: 5 of 40 steps are "
        "trained and saved"
    )
    code, report = doctor(directory)
    assert code == 1
    assert severe(report) == ["cut_off", "no_answer", "all_alike", "no_gradient"]


HANGING_SINK = """
import threading

class Sink:
    def open(self, run): threading.Event().wait()
    def step(self, step, metrics): ...
    def event(self, event): ...
    def close(self): ...
"""


def test_a_teacher_that_is_paid_for_ends_the_run_when_its_budget_is_spent(tmp_path: Path) -> None:
    """What the server was asked is what the run has counted, and a resume with more goes on. A sink
    that hangs holds up neither the run nor its end."""
    directory = tmp_path / "run"
    (tmp_path / "hangs.py").write_text(HANGING_SINK)
    with running(Server()) as server:
        paid = {
            "run.steps": 8,
            "scheduler.new_questions": 2,
            "actors.teacher.engine": "openai",
            "teacher.model": MODEL,
            "actors.teacher.engine_args": json.dumps({"base_url": server.base_url}),
            "teacher.budget.requests": 24,
            "sinks.use": json.dumps([{"use": f"{tmp_path}/hangs.py:Sink"}]),
            "sinks.close_seconds": 1,
        }
        done = launch(directory, **paid)
        assert done.returncode == 1, done.stdout + done.stderr
        steps = checkpoint.find_latest(directory).step
        assert 0 < steps < 8
        assert said(done)[0] == (
            "the teacher's budget is spent: 24 requests of 24 (teacher.budget.requests; raise it "
            f"to go on): {steps} of 8 steps are trained and saved"
        )
        assert "sink left: sinks.own-hangs.Sink: it did not close in 1 s" in done.stdout
        assert spent(directory) == (24, tokens_of(server)) and len(server.requests) == 24
        again = resume(directory)
        assert (again.returncode, again.stderr) == (
            2,
            "--resume: teacher.budget.requests is 24 and 24 are spent; raise it, for example with "
            "--set teacher.budget.requests=48\n",
        )
        dry = resume(directory, "--dry-run", "--offline", **{"teacher.budget.requests": 48})
        cost = f"the teachers have cost 24 requests and {tokens_of(server):,} tokens so far, "
        assert cost in " ".join(dry.stdout.split()), dry.stdout + dry.stderr
        more = resume(directory, **{"teacher.budget.requests": "null", "sinks.use": "[]"})
        assert more.returncode == 0, more.stdout + more.stderr
        assert spent(directory) == (len(server.requests), tokens_of(server))
    assert checkpoint.find_latest(directory).step == 8


def resume(directory: Path, *options: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "zppo.launch", "--resume", str(directory), *options]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def spent(directory: Path) -> tuple[int, int]:
    """(requests, tokens) that the run says its teacher has cost."""
    command = [sys.executable, "-P", "-m", "zppo.report", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    summary = json.loads(done.stdout)
    return sum(summary["teacher_requests"].values()), sum(summary["teacher_tokens"].values())


def tokens_of(server: Server) -> int:
    """What a good answer counts: 7 tokens of the prompt, and 5 of each choice."""
    return sum(7 + 5 * request.asked for request in server.requests)
