"""A student with recurrent layers and a tower for pictures, trained on questions with and without
pictures by real processes, killed and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from recurrent_models import make_seeing, save_seeing
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from zppo.records import checkpoint
from zppo.records.summary import read_lines, summarise

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
PATIENCE = 900.0
REWARD = """
import zlib

def luck(question, response, row):
    return zlib.crc32(response.encode()) % 5 / 2
"""
"""Bytes at random earn no answer's reward, so the groups would be all alike."""

pytestmark = pytest.mark.slow


def command(*arguments: str, **settings: object) -> list[str]:
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-P", "-m", "zppo.launch", *arguments, *given]


def launch_and_kill(arguments: list[str], directory: Path, step: int) -> None:
    """Kill every process of the run once the checkpoint of `step` is there."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not directory.exists() or checkpoint.find_latest(directory).step < step:
        assert process.poll() is None and process.stderr, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    everybody = [
        psutil.Process(process.pid),
        *psutil.Process(process.pid).children(recursive=True),
    ]
    for one in everybody:
        one.kill()
    process.communicate()
    psutil.wait_procs(everybody, timeout=30)


def write_questions(folder: Path, count: int) -> Path:
    """Questions with none, one and two pictures of several sizes in turn."""
    numbers, rows = np.random.default_rng(0), []
    for i in range(count):
        names = [f"{i}-{k}.png" for k in range(i % 3)]
        for name in names:
            size = tuple(32 * numbers.integers(1, 4, 2))
            pixels = numbers.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
        rows.append({"id": f"q{i}", "question": f"how many {i}?", "answer": "1", "images": names})
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_student_is_trained_on_pictures_killed_and_resumed(tmp_path: Path) -> None:
    student = save_seeing(make_seeing(), tmp_path / "student")
    directory, reward = tmp_path / "run", tmp_path / "mine.py"
    reward.write_text(REWARD)
    settings = {
        "run.directory": directory,
        "run.steps": 100,
        "method.name": "grpo",
        "data.reward": json.dumps([{"use": f"{reward}:luck", "weight": 1.0}]),
        "data.train": write_questions(tmp_path, 240),
        "data.fields": "{}",
        "data.max_prompt_tokens": 512,
        "data.heldout": "null",
        "student.model": student,
        "student.sampling.max_new_tokens": 10,
        "scheduler.new_questions": 2,
        "scheduler.max_staleness": 0,
        "evaluation.every": "null",
        "optimizer.learning_rate": 1e-2,
        "actors.rollout.count": 1,
        "actors.rollout.engine_args.max_sequences": 12,
        "checkpoints.every": 1,
        "sinks.tensorboard": "false",
    }
    launch_and_kill(command("--topology", str(QUICKSTART), **settings), directory, step=1)
    reached = checkpoint.find_latest(directory).step
    steps = reached + 2
    resumed = subprocess.run(
        command("--resume", str(directory), **{"run.steps": steps}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    summary = summarise(directory)
    assert (summary["steps"], summary["trained_twice"], summary["lost"]) == (steps, 0, 0)
    for line in read_lines(directory / "metrics.jsonl"):
        assert line["train/updates"] > 0
        # Without staleness: what the engine says of its tokens is what the trainer says of them.
        assert line["train/log_prob_gap_max"] < 1e-4
    check_folder(checkpoint.final_folder(directory, steps) / "model", student)


def check_folder(saved: Path, student: Path) -> None:
    """It opens as what it was, with all that lay in it; what sees pictures is untouched."""
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert [type(model).__name__] == AutoConfig.from_pretrained(saved).architectures
    beside = {path.name for path in student.iterdir()} - {"config.json", "model.safetensors"}
    assert {"preprocessor_config.json", "video_preprocessor_config.json"} < beside
    assert {path.name for path in saved.iterdir()} == beside | {"config.json", "model.safetensors"}
    for name in beside:
        assert (saved / name).read_bytes() == (student / name).read_bytes(), name
    before, after = (load_file(folder / "model.safetensors") for folder in (student, saved))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("model.visual.")}
