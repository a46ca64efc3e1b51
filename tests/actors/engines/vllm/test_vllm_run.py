"""Whole runs whose student is served by vLLM: what the system does when memory runs out, and when
it is short at start.

The kernel ends a process that takes too much memory with SIGKILL, without a word; so do these
tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from living import titled
from vllm_helpers import ENGINE_ARGS, save_tiny

from zppo import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PATIENCE = 1800.0
STEPS = 16
"""Many enough that the run is still going on when its engine is killed after the first."""


def write_topology(folder: Path, **engine_args: Any) -> Path:
    """A run of `STEPS` short steps in `folder`."""
    save_tiny(folder / "student", tied=False)
    rows = [
        {"question": f"w{i % 30 + 3} w{i % 31 + 4}", "answer": str(i)} for i in range(2 * STEPS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = {"max_new_tokens": 128}
    topology = {
        "run": {"directory": str(folder / "run"), "steps": STEPS},
        "method": {"name": "grpo", "group_size": 4},
        "data": {"train": "train.jsonl"},
        "student": {"model": "student", "dtype": "float32", "sampling": sampling},
        "actors": {
            "rollout": {
                "engine": "vllm",
                "threads": 1,
                "engine_args": {**ENGINE_ARGS, **engine_args},
            }
        },
        "scheduler": {"new_questions": 2},
    }
    path = folder / "topology.yaml"
    path.write_bytes(msgspec.yaml.encode(topology))
    return path


def started(topology: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "zppo.launch", "--topology", str(topology)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait for the end; returns everything that was printed, with the actors' last words behind
    it."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = "the run hangs: " + process.communicate()[0]
    logs = sorted((folder / "run" / "logs").glob("*.log"))
    return output + "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in logs)


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process of vLLM that holds the model."""
    children = psutil.Process(process.pid).children(recursive=True)
    (worker,) = titled(children, "Worker")
    return worker


def test_an_engine_that_runs_out_of_memory_is_restarted_and_its_work_done_by_the_next(
    tmp_path: Path,
) -> None:
    process = started(write_topology(tmp_path))
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(process, lambda: metrics.exists() and bool(metrics.read_text()))
    try:
        worker_of(process).kill()
    finally:
        output = finish(process, tmp_path)
    assert process.returncode == 0, output
    command = [sys.executable, "-P", "-m", "zppo.report", str(tmp_path / "run"), "--json"]
    summary = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert summary["steps"] == STEPS and summary["questions_new"] == 2 * STEPS
    assert summary["trained_twice"] == 0 and summary["lost"] == 0
    assert "rollout-0 ended with exit code 1" in output


@pytest.mark.parametrize(
    ("engine_args", "sentence"),
    [
        (
            {"kv_cache_memory_bytes": 1000},
            "actors.rollout.engine_args.kv_cache_memory_bytes is 1000; expected at least 540672, "
            "the keys and values "
            "of one sequence of 1024 tokens (max_model_len) and a block that vLLM keeps for itself\n",
        ),
        (
            {"max_model_len": 4096},
            (
                "actors.rollout.engine_args.max_model_len is 4096; expected at most 1024, the "
                "context of student.model\n"
            ),
        ),
        (
            {"enable_chunked_prefill": True},
            "actors.rollout.engine_args.enable_chunked_prefill is true; expected false on a CPU, "
            "where vLLM's engine "
            "core dies of a prompt that it reads in parts\n",
        ),
        (
            {"max_num_batched_tokens": 512},
            "actors.rollout.engine_args.max_num_batched_tokens is 512; expected at least 1024 "
            "(max_model_len), because prompts are read whole on a CPU\n",
        ),
        (
            {"max_model_len": 8},
            "data.train: the question 'train-",
        ),
        (
            {"kv_cache_memory_bytes": 1 << 60},
            "the plan needs 107374182",
        ),
    ],
    ids=["small-cache", "long-context", "chunked", "small-step", "short-context", "no-memory"],
)
def test_sizes_that_cannot_work_are_one_sentence_before_anything_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine_args: dict[str, Any],
    sentence: str,
) -> None:
    topology = write_topology(tmp_path, **engine_args)
    capsys.readouterr()  # what transformers says when it saves the model
    assert launch.main(["--topology", str(topology), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(sentence) and said.err.count("\n") == 1 and not said.out, said
    assert not (tmp_path / "run").exists()
