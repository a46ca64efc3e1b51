"""A comparison of two methods, with real runs of the quickstart, interrupted and continued. What
runs of a second seed would leave is a copy of these."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from living import command_of
from msgspec import structs

from zppo.comparison.record import read_record, run_folder
from zppo.comparison.results import load_results
from zppo.records.summary import read_lines, summarise

ROOT = Path(__file__).parents[2]
PATIENCE = 1500.0
STEPS = 5
"""Many enough that a run is still going on when it is interrupted after its first."""
SETTINGS = {
    "run.steps": STEPS,
    "scheduler.new_questions": 8,
    "scheduler.lease_seconds": 60,
    "evaluation.limit": 8,
    "evaluation.samples": 2,
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


class Comparison:
    """One `python -m zppo.compare` on the quickstart."""

    def __init__(self, out: Path) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "zppo.compare",
            "--topology",
            str(ROOT / "examples/quickstart.yaml"),
        ]
        command += ["--methods", "grpo_replay,zppo", "--seeds", "0", "--out", str(out)]
        for name, value in SETTINGS.items():
            command += ["--set", f"{name}={value}"]
        self.out = out
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.wait()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    @contextmanager
    def frozen(self, actor: str) -> Iterator[None]:
        """While a process of the run at work is stopped, so that the run cannot end."""
        found = self._actor(actor)
        found.suspend()
        try:
            yield
        finally:
            found.resume()

    def _actor(self, name: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if name in command_of(child):
                return child
        raise AssertionError(f"there is no {name}:\n{self.logs()}")

    def wait(self) -> str:
        """Wait for the end and return everything it printed."""
        try:
            return self.process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the comparison hangs:\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(
            f"== {log.name}\n{log.read_text()[-2000:]}" for log in (self.out / "logs").glob("*.log")
        )


def test_a_comparison_is_interrupted_and_continued(tmp_path: Path, runtime_base: Path) -> None:
    out = tmp_path / "c"
    first = Comparison(out)
    first.until(lambda: len(read_lines(out / "runs/grpo_replay-seed0/metrics.jsonl")) >= 1)
    with first.frozen("trainer"):
        first.process.send_signal(signal.SIGINT)
        first.until(lambda: "stopping: the trainer finishes its step" in first.logs())
    said = first.wait()
    assert first.process.returncode == 130, said + first.logs()
    assert "continue with the same command: zppo compare --topology" in said
    assert not (out / "comparison.html").exists()

    again = Comparison(out)
    said = again.wait()
    assert again.process.returncode == 0, said + again.logs()
    assert "[1/2] grpo_replay seed 0: goes on from its last checkpoint" in said
    assert f"[2/2] zppo seed 0: {STEPS} steps in " in said
    check_runs(out)
    check_report(out)
    assert list(runtime_base.iterdir()) == []


def check_runs(out: Path) -> None:
    record = read_record(out)
    for pair in record.pairs():
        summary = summarise(run_folder(out, pair))
        assert summary["steps"] == STEPS and summary["questions_new"] == 8 * STEPS
        assert summary["trained_twice"] == 0 and summary["lost"] == 0
    asked = [
        [line["by_question"].keys() for line in read_lines(run_folder(out, pair) / "heldout.jsonl")]
        for pair in record.pairs()
    ]
    assert all(names == asked[0] and len(names[0]) == 8 for names in asked)
    zppo, plain = (
        read_lines(out / f"runs/{name}-seed0/metrics.jsonl") for name in ("zppo", "grpo_replay")
    )
    for line in zppo:
        assert line["compute/student_written"] == line["tokens/generated"]
        assert line["compute/teacher_draws_written"] == line["tokens/teacher"] > 0
        assert line["compute/teacher_other_written"] > 0  # compressed candidates
        assert line["compute/trained"] > line["train/tokens_trained"] == line["tokens/generated"]
    assert all(
        line["compute/teacher_draws_read"] == line["compute/teacher_other_read"] == 0
        for line in plain
    )


def check_report(out: Path) -> None:
    record = read_record(out)
    for pair in record.pairs():
        folder = run_folder(out, pair)
        shutil.copytree(folder, run_folder(out, structs.replace(pair, seed=1)))
    world = load_results(out, structs.replace(record, seeds=[0, 1]))
    assert world.step == STEPS and world.cost is not None
    assert [len(method.finished) for method in world.methods] == [2, 2]
    assert world.difference(world.methods[1], world.at_cost) is not None
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 2
    assert all(float(row["flops"]) > 0 for row in rows)
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert {
        "accuracy",
        "accuracy_flops",
        "occupancy",
        "composition",
        "accuracy_bcq",
        "compute",
    } <= names
