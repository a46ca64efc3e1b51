"""Whole runs with a teacher behind a server: all its work goes there, the key stays out, and the
run can do without."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai_server as fake
import pytest
from openai_server import MODEL, Request, Server, running

from zppo.config.topology import JUDGE_SAMPLING
from zppo.records.rollouts import read_step, step_files

ROOT = Path(__file__).parents[4]
KEY = "sk-never-to-be-seen-0123456789"
RESPONSE_TOKENS, COMPRESSED_TOKENS = 24, 16
"""What examples/quickstart.yaml allows the teacher; the server tells the kinds of work apart by
them."""
STEPS = 2
PATIENCE = 900.0
SMALL = {
    "run.steps": STEPS,
    "scheduler.new_questions": 8,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine": "openai",
    "teacher.model": MODEL,
}

pytestmark = pytest.mark.slow


def launch(
    directory: Path, monkeypatch: pytest.MonkeyPatch, engine_args: dict[str, Any], **settings: Any
) -> str:
    """Run to the end and return everything that was printed."""
    monkeypatch.setenv("SERVED_KEY", KEY)
    arguments = json.dumps({"api_key_env": "SERVED_KEY", **engine_args})
    merged = {
        **SMALL,
        "run.directory": directory,
        "actors.teacher.engine_args": arguments,
        **settings,
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "zppo.launch",
        "--topology",
        str(ROOT / "examples" / "quickstart.yaml"),
    ]
    for name, value in merged.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
    )
    logs = [
        f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(directory.glob("logs/*.log"))
    ]
    assert done.returncode == 0, "\n".join([done.stdout, *logs])
    return done.stdout


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [
        row
        for path in step_files(directory / "rollouts")
        for row in read_step(path)
        if row["kind"] == kind
    ]


def files_with_the_key(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]


def solution(prompt: str) -> str:
    """The worked answer to a product modulo 23, or 0 to any other prompt."""
    product = re.search(r"(\d+(?: \* \d+)+) mod 23", prompt)
    answer = 1 if product else 0
    for factor in product[1].split(" * ") if product else ():
        answer = answer * int(factor) % 23
    return f"\\boxed{{ {answer} }}"


async def helpful(request: Request, writer: asyncio.StreamWriter) -> None:
    """Half of the teacher's answers are right, the judge believes nobody, and compressions keep the
    answer."""
    prompt = request.body["messages"][-1]["content"]
    if request.body["max_tokens"] == JUDGE_SAMPLING.max_new_tokens:
        texts = ['{"verdict": "wrong"}']
    elif request.body["max_tokens"] == COMPRESSED_TOKENS:
        texts = [(re.findall(r"\\boxed\{[^{}]*\}", prompt) or ["none"])[-1]]
    else:
        texts = [solution(prompt) if i % 2 else "\\boxed{ 99 }" for i in range(request.asked)]
    body = b"".join(fake.piece(index, text, "stop") for index, text in enumerate(texts))
    body += fake.event(
        {"choices": [], "usage": {"completion_tokens": 10 * len(texts), "prompt_tokens": 5}}
    )
    writer.write(fake.raw(body + b"data: [DONE]\n\n", Content_Type="text/event-stream"))


def test_sampling_compression_and_judging_go_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Server(key=KEY)) as server:
        server.default = helpful
        launch(
            tmp_path / "run", monkeypatch, {"base_url": server.base_url}, **{"data.grader": "judge"}
        )
    asked = {request.body["max_tokens"] for request in server.requests}
    assert asked == {RESPONSE_TOKENS, COMPRESSED_TOKENS, JUDGE_SAMPLING.max_new_tokens}
    steps = metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == list(range(STEPS))
    taught = rows(tmp_path / "run", "teacher")
    assert len(taught) >= 4 and {row["prompt_length"] for row in taught} == {5}
    assert sum(line["tokens/teacher"] for line in steps) == 10 * len(taught)
    assert rows(tmp_path / "run", "bcq")
    assert not files_with_the_key(tmp_path)


def test_the_run_goes_on_without_a_teacher_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Server(key=KEY)) as server:
        server.default = fake.status(500, said=f"broken, says {KEY}")
        launch(tmp_path / "run", monkeypatch, {"base_url": server.base_url, "retry_budget": 3})
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(STEPS))
    assert not rows(tmp_path / "run", "teacher")
    log = (tmp_path / "run" / "logs" / "teacher-0.log").read_text()
    assert "a request failed: the server answers HTTP 500: broken, says ***" in log
    assert "Traceback" not in log
    assert not files_with_the_key(tmp_path)
