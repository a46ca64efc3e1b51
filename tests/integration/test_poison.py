"""Runs of real processes that meet something that would kill the trainer in every life."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

from zppo.config.load import load
from zppo.plan.processes import ProcessEntry
from zppo.records import run_directory
from zppo.records.summary import summarise
from zppo.signals import Interrupts
from zppo_actors.supervisor.supervisor import supervise

ROOT = Path(__file__).parents[2]
SICK = ROOT / "tests/helpers/sick_actor.py"
SETTINGS = {
    "run.steps": 4,
    "method.name": "grpo",
    "teacher": "null",
    "data.heldout": "null",
    "evaluation.every": "null",
    "scheduler.new_questions": 4,
    "actors.rollout.count": 1,
    "actors.rollout.engine": "simulated",
    "checkpoints.every": 1,
    "sinks.tensorboard": "false",
}
pytestmark = pytest.mark.slow


class Lines:
    """A view that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, status: object) -> None: ...

    def log(self, line: str) -> None:
        self.lines.append(line)

    def close(self, verdict: str = "") -> None: ...


def sick_command(entry: ProcessEntry) -> list[str]:
    return [sys.executable, "-P", str(SICK), entry.role]


def events(run: Path, name: str) -> list[tuple[str, str]]:
    connection = sqlite3.connect(run / "journal.sqlite")
    rows = connection.execute(
        "SELECT actor, detail FROM events WHERE event = ?", (name,)
    ).fetchall()
    connection.close()
    return rows


def test_a_poisoned_window_is_sampled_again_and_a_forged_answer_never_gets_in(
    tmp_path: Path,
) -> None:
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    topology = load(ROOT / "examples/quickstart.yaml", settings)
    run, view = tmp_path / "run", Lines()
    run_directory.create(run, topology)
    end = supervise(run, view, Interrupts(), sick_command)
    logs = "\n".join(log.read_text()[-2000:] for log in (run / "logs").glob("*.log"))
    assert end.exit_code == 0, logs
    # Scripted log-probs are far from the trainer's, of which the verdict warns.
    assert end.verdict.startswith("finished: 4 of 4 steps"), logs
    again = [line for line in view.lines if "begins again" in line]
    assert len(again) == 2, "two lives died, the third had other samples"
    assert again[0].startswith("trainer was killed by SIGKILL; the run begins again from step ")
    assert again[1].startswith(
        "trainer was killed by SIGKILL (it died 2 times on window 2, whose samples are drawn "
        "again); the run begins again from step "
    )
    assert run_directory.read(run).trainer_deaths == {2: 2}
    poisoned = "window 2: the trainer died on it 2 times; it is sampled again"
    assert events(run, "poisoned_window") == [("controller", poisoned)]
    refused = events(run, "refused_answer")
    assert len(refused) in (2, 3), "one for each life that had something left to sample"
    for actor, detail in refused:
        assert actor == "rollout-0"
        assert "it sent the token id 2147483647; expected ids below " in detail
    summary = summarise(run)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (4, 0, 0)
    assert summary["questions_new"] == 16
