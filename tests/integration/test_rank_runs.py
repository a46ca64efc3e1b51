"""Whole runs whose trainer has two ranks: a rank killed in the middle of a step, and a resume with
another number of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from living import command_of

from zppo.records import checkpoint
from zppo.records.run_directory import read, runtime_base, runtime_folder
from zppo.records.summary import summarise

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
PATIENCE = 900.0
SMALL = {
    "scheduler.new_questions": 8,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
    "checkpoints.every": 1,
}

pytestmark = pytest.mark.slow


def started(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "zppo.launch", *arguments]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait(run: subprocess.Popen[str]) -> str:
    try:
        return run.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError(f"the run hangs:\n{run.communicate()[0]}") from None


def until(run: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert run.poll() is None, wait(run)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rank(run: subprocess.Popen[str], name: str) -> psutil.Process:
    """The process of an actor, by the name on its command line."""
    for child in psutil.Process(run.pid).children(recursive=True):
        if name in command_of(child):
            return child
    raise AssertionError(f"there is no {name}")


def logs(directory: Path) -> str:
    files = sorted((directory / "logs").glob("*.log"))
    return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in files)


def test_a_rank_killed_in_a_step_and_a_resume_with_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = {**SMALL, "run.directory": directory, "run.steps": 4, "actors.trainer.ranks": 2}
    run = started("--topology", str(QUICKSTART), **settings)
    until(run, lambda: checkpoint.find_latest(directory).step >= 1)
    first, second = rank(run, "trainer"), rank(run, "trainer-1")
    marker = runtime_folder(read(directory).run_id, runtime_base()) / "training"
    until(run, marker.exists)
    second.suspend()  # so that the run waits for what is looked at
    # The collectives listen on this host alone.
    addresses = {c.laddr.ip for one in (first, second) for c in one.net_connections()}
    assert addresses and all(ip.startswith("127.") or ip == "::1" for ip in addresses)
    second.kill()
    said = wait(run)
    assert run.returncode == 0, said + logs(directory)
    assert "trainer-1 was killed by SIGKILL" in said, said
    assert re.search(r"the run begins again from step [123]\b", said), said

    resumed = started("--resume", str(directory), **{"run.steps": 5, "actors.trainer.ranks": 1})
    said = wait(resumed)
    assert resumed.returncode == 0, said + logs(directory)
    summary = summarise(directory)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (5, 0, 0)
    assert summary["questions_new"] == 5 * 8
