"""A run with a method and rewards of the user's own: the examples, and rewards that raise at random;
it is resumed, and refused once the code has changed. What reads run directories imports nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zppo.records.rollouts import read_step, step_files
from zppo.records.summary import read_lines, summarise

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 600
REWARDS = '''
import zlib

def moody(question, response, row):
    """Raises on a third of the responses; which ones depends on their text alone."""
    if zlib.crc32(response.encode()) % 3 == 0:
        raise ValueError("no mood")
    return 0.25 * (len(row["question"]) % 2)
'''
POISON = "\nopen({marker!r}, 'w').close()\n"

pytestmark = pytest.mark.slow


def zppo(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "zppo", *arguments]
    ours = os.environ.get("PYTHONPATH", "")
    env = os.environ | ({"PYTHONPATH": f"{path}{os.pathsep}{ours}"} if path else {})
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=env
    )


def settings(directory: Path, file: Path) -> list[str]:
    rewards = [
        {"use": "exact", "weight": 1.0},
        {"use": f"{EXAMPLES}/own/rewards.py:short", "weight": 0.25, "args": {"most": 12}},
        {"use": f"{file}:moody", "weight": 1.0},
    ]
    given = {
        "run.directory": directory,
        "run.steps": 2,
        "method.name": f"{EXAMPLES}/own/method.py:METHOD",
        "data.reward": json.dumps(rewards),
        "scheduler.new_questions": 12,
        "scheduler.max_staleness": 1,
        "data.heldout": "null",
        "evaluation.every": "null",
        "actors.rollout.count": 1,
        "checkpoints.every": 1,
        "sinks.tensorboard": "false",
    }
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


def test_own_method_and_rewards_that_raise_at_random(tmp_path: Path) -> None:
    directory, file = tmp_path / "run", tmp_path / "mine.py"
    file.write_text(REWARDS)
    topology = EXAMPLES / "quickstart.yaml"
    done = zppo("launch", "--topology", str(topology), *settings(directory, file))
    assert done.returncode == 0, done.stdout + done.stderr
    done = zppo("launch", "--resume", str(directory), "--set", "run.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    check_record(directory)

    was = json.loads((directory / "run.json").read_text())["extensions"][f"{file}:moody"]
    marker = tmp_path / "imported"
    file.write_text(REWARDS + POISON.format(marker=str(marker)))
    for reading in (["report", str(directory)], ["doctor", str(directory)]):
        done = zppo(*reading)
        assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr
    assert not marker.exists(), "reading a run directory imported the code that it names"

    done = zppo("launch", "--resume", str(directory), "--set", "run.steps=4")
    assert done.returncode == 2
    said = done.stderr.strip()
    assert said.startswith(
        f"data.reward[2].use: the code of '{file}:moody' has changed since the checkpoint of step "
        f"3 was written (it was {was[: len('sha256:') + 12]} and is sha256:"
    )
    assert said.endswith("put the old code back, or begin a new run")


def check_record(directory: Path) -> None:
    """Every question was trained once; what failed is left out; the parts are recorded."""
    summary = summarise(directory)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (3, 0, 0)
    lines = read_lines(directory / "metrics.jsonl")
    assert all(0.05 < line["answers/failed"] < 0.7 for line in lines)
    assert all(
        {"reward_part/exact", "reward_part/short", "reward/plain"} <= set(line) for line in lines
    )
    rows = [row for path in step_files(directory / "rollouts") for row in read_step(path)]
    assert {row["kind"] for row in rows} == {"plain", "second_look"}
    failed = [row for row in rows if row["correct"] is None]
    assert failed and not any(row["trained"] for row in failed)
    assert {row["note"] for row in failed} == {
        f"the reward '{directory.parent}/mine.py:moody' raised ValueError: no mood"
    }
    for row in rows:
        if row["correct"] is not None:
            parts = json.loads(row["reward_parts"])
            value = parts["exact"] + 0.25 * parts["short"] + parts["moody"]
            assert abs(row["reward"] - value) < 1e-6
            assert row["correct"] == (row["reward"] >= 1.0) and row["trained"]


PACKAGE = Path(__file__).parents[1] / "helpers" / "extension_package"


def installed(folder: Path) -> Path:
    """A folder with the package as pip installs it; it is built from a copy, so that nothing is left
    beside the sources."""
    shutil.copytree(PACKAGE, folder / "sources")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(folder / "sources")]
    subprocess.run(command, check=True, timeout=SECONDS, capture_output=True)
    return folder / "site"


def test_an_installed_package_brings_one_of_each_kind(tmp_path: Path) -> None:
    """Each is named as its entry point announces it; no file of this package knows of them."""
    site, directory, file = installed(tmp_path), tmp_path / "run", tmp_path / "lines.jsonl"
    groups = tmp_path / "groups"
    given = {
        "run.directory": directory,
        "run.steps": 2,
        "method.name": "acme_again",
        "method.correct_reward": 0.5,
        "data.train": "acme_rows",
        "data.reward": json.dumps([{"use": "acme_near"}]),
        "data.heldout": "null",
        "evaluation.every": "null",
        "scheduler.new_questions": 8,
        "scheduler.rho_aug": 1.0,
        "actors.rollout.count": 1,
        "actors.rollout.engine": "acme_counting",
        "actors.rollout.engine_args": json.dumps({"file": str(groups)}),
        "sinks.tensorboard": "false",
        "sinks.use": json.dumps([{"use": "acme_lines", "args": {"file": str(file)}}]),
    }
    arguments = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    topology = str(EXAMPLES / "quickstart.yaml")
    done = zppo("launch", "--topology", topology, *arguments)
    assert done.returncode == 2, "without the package"
    done = zppo("launch", "--topology", topology, *arguments, path=site)
    assert done.returncode == 0, done.stdout + done.stderr

    record = json.loads((directory / "run.json").read_text())["extensions"]
    assert sorted(record) == ["acme_again", "acme_counting", "acme_near", "acme_rows"]
    assert len(set(record.values())) == 1
    assert record["acme_near"].startswith("acme-zppo 3.1 sha256:")
    rows = [row for path in step_files(directory / "rollouts") for row in read_step(path)]
    assert {row["kind"] for row in rows} == {"plain", "again"}
    by_group: dict[str, list[bool]] = {}
    for row in rows:
        by_group.setdefault(row["group_id"], []).append(row["trained"])
        assert row["correct"] == (row["reward"] >= 0.5)
    assert all(trained == [True] * 3 + [False] * 5 for trained in by_group.values())
    assert groups.read_text().split().count("8") >= len(by_group)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(0.0 <= line["digits"] <= 1.0 for line in lines)
