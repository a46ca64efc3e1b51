"""A student with recurrent layers and a tower for pictures and videos, trained on questions with
and without them by real processes, killed, resumed and evaluated."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from recurrent_models import make_seeing, save_seeing
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from zppo.prompting.tokenization import load_picture_layout, load_tokenizer
from zppo.records import checkpoint, rollouts
from zppo.records.summary import read_lines, summarise
from zppo_protocol.values import VideoReference

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
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended because another one has
            one.kill()
    process.communicate()
    psutil.wait_procs(everybody, timeout=PATIENCE)


def write_questions(file: Path, count: int, *, films: bool = False) -> Path:
    """Questions with none, one and two pictures of several sizes and with a video of three frames
    in turn, or all with a video."""
    numbers, rows = np.random.default_rng(int(films)), []
    for i in range(count):
        turn = 3 if films else i % 4
        sizes = [tuple(32 * numbers.integers(1, 4, 2)) for _ in range(turn)]
        names = [f"{file.stem}-{i}-{k}.png" for k in range(turn)]
        film = turn == 3
        for name, size in zip(names, sizes, strict=True):
            pixels = numbers.integers(0, 256, (*(sizes[0] if film else size), 3)).astype(np.uint8)
            Image.fromarray(pixels).save(file.parent / name)
        shown = {"videos": {"frames": names, "seconds": [0.0, 0.5, 2.0]}} if film else {}
        pictures = {} if film else {"images": names}
        question = f"{file.stem} {i}?"
        rows.append({"id": question, "question": question, "answer": "1", **pictures, **shown})
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
        "data.train": write_questions(tmp_path / "train.jsonl", 240),
        "data.fields": "{}",
        "data.max_prompt_tokens": 512,
        "data.heldout": write_questions(tmp_path / "heldout.jsonl", 4, films=True),
        "student.model": student,
        "student.sampling.max_new_tokens": 10,
        "scheduler.new_questions": 2,
        "scheduler.max_staleness": 0,
        "evaluation.every": 1,
        "evaluation.samples": 1,
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
    assert summary["heldout_after"] is not None
    check_films(directory, student)
    check_folder(checkpoint.final_folder(directory, steps) / "model", student)


def check_films(directory: Path, student: Path) -> None:
    """The student was shown videos as such: by the length of their prompts, in bytes but for what
    stands in the place of the mark."""
    tokenizer = load_tokenizer(str(student), "student.model")
    layout = load_picture_layout(str(student), tokenizer, "student.model")
    assert layout is not None and layout.shows_videos
    rows = [
        row
        for path in rollouts.step_files(directory / "rollouts")
        for row in rollouts.read_step(path)
    ]
    assert {row["kind"] for row in rows if row["trained"]} == {"plain"}
    around = {
        row["prompt_length"] - len(row["question_id"])
        for row in rows
        if row["kind"] == "plain" and row["media"] is None
    }
    films = [row for row in rows if '"kind":"video"' in (row["media"] or "")]
    assert films and len(films) < len(rows)
    for row in films:
        [video] = msgspec.json.decode(row["media"], type=list[VideoReference])
        tokens = len(layout.expansion(video)) + len(("start", "end"))
        assert {row["prompt_length"] - len(row["question_id"]) - tokens} == around


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
