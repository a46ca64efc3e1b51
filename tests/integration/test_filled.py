"""A run of real processes whose steps are filled by finished groups: killed, resumed, counted."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from zppo.records import checkpoint
from zppo.records.summary import read_lines, summarise

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
PATIENCE = 900.0
STEPS, NEW = 8, 8
SETTINGS = {
    "run.steps": STEPS,
    "scheduler.batches": "filled",
    "scheduler.max_staleness": 2,
    "scheduler.new_questions": NEW,
    "scheduler.rho_aug": 1.0,
    "checkpoints.every": 2,
    "evaluation.limit": 4,
    "evaluation.samples": 1,
    "evaluation.every": "null",
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
}


def launch(*arguments: str, **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "zppo.launch", *arguments]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_filled_batches_lose_nothing_when_the_run_is_killed_and_resumed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = launch("--topology", str(QUICKSTART), **SETTINGS, **{"run.directory": directory})
    deadline = time.monotonic() + PATIENCE
    while checkpoint.find_latest(directory).step < 2 if directory.exists() else True:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    first.communicate(timeout=PATIENCE)

    changed = launch("--resume", str(directory), **{"scheduler.batches": "windows"})
    said, _ = changed.communicate(timeout=PATIENCE)
    assert changed.returncode == 2
    assert (
        "--resume: scheduler.batches was 'filled' and is now 'windows'; it cannot change, because "
        "what is in flight was begun for the other"
    ) in " ".join(said.split())

    second = launch("--resume", str(directory))
    said, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    summary = summarise(directory)
    assert summary["steps"] == STEPS and summary["questions_new"] == STEPS * NEW
    assert (summary["trained_twice"], summary["lost"]) == (0, 0)
    assert summary["max_staleness_seen"] <= 2
    lines = read_lines(directory / "metrics.jsonl")
    assert [line["window/new"] for line in lines] == [NEW] * STEPS
    with closing(sqlite3.connect(directory / "journal.sqlite")) as journal:
        rows = journal.execute("SELECT step, window, kind FROM trained").fetchall()
        settled = {window for (window,) in journal.execute("SELECT window FROM settled")}
        [[dispatched]] = journal.execute("SELECT COUNT(*) FROM dispatched")
    assert settled == set(range(STEPS)) and dispatched == STEPS * NEW
    assert {kind for _, _, kind in rows} >= {"plain", "bcq", "ncq"}
    assert any(step != window for step, window, _ in rows), "filled from several windows"
