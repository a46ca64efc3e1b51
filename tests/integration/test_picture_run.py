"""The example on pictures, shortened: real processes train on pictures and on videos, before and
between the words of questions and in earlier messages, and the report shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from zppo import launch
from zppo.records import rollouts
from zppo.records.summary import summarise
from zppo.report import cli as report

EXAMPLE = Path(__file__).parents[2] / "examples" / "pictures.yaml"
COLOURS = {"red": (214, 48, 49), "blue": (41, 98, 210), "black": (32, 32, 36)}
PLACES = {"left": (0, 1), "middle": (1, 1), "right": (2, 1)}
PATIENCE = 900.0

pytestmark = pytest.mark.slow


def board(folder: Path, name: str, colour: str, place: str) -> str:
    """A circle in one of three cells of a board like those of the example."""
    picture = Image.new("RGB", (48, 48), (250, 248, 242))
    x, y = (16 * cell + 8 for cell in PLACES[place])
    ImageDraw.Draw(picture).ellipse((x - 6, y - 6, x + 6, y + 6), fill=COLOURS[colour])
    picture.save(folder / name)
    return name


def taken(file: Path) -> dict[str, object]:
    """The picture as the cell of a table; the file is no more."""
    content = file.read_bytes()
    file.unlink()
    return {"bytes": content, "path": file.name}


def asked(kind: str, what: str, way: int) -> list[dict[str, object]]:
    """About a picture or video between the words, or in a message before the last."""
    if way > 0:
        return [said("user", f"{what} is", kind, "the circle")]
    earlier = [said("user", "where is the circle", kind), said("assistant", "left")]
    return [*earlier, said("user", f"{what} is the circle")]


def said(role: str, *content: str) -> dict[str, object]:
    parts = [
        {"type": one, "text": None} if one in ("image", "video") else {"type": "text", "text": one}
        for one in content
    ]
    return {"role": role, "content": parts}


def write_questions(folder: Path, name: str, offset: int) -> Path:
    """Six questions about a picture, and six about where a circle ends that moves in a video, which
    begins after `offset` seconds. With another offset they are others. Pictures of a `.parquet` lie
    in its cells."""
    rows: list[dict[str, object]] = []
    for colour in COLOURS:
        for way in (1, -1):
            places = list(PLACES)[::way]
            ident = f"{Path(name).stem}-{colour}-{way}"
            frames = [
                board(folder, f"{ident}-{k}.png", colour, place) for k, place in enumerate(places)
            ]
            seconds = [0.5 * k + offset for k in range(3)]
            rows += [
                {
                    "id": f"{ident}-film",
                    "question": asked("video", "where", way),
                    "answer": places[-1],
                    "videos": {"frames": frames, "seconds": seconds},
                },
                {
                    "id": f"{ident}-board",
                    "question": asked("image", "where" if offset else "what colour", way),
                    "answer": places[0] if offset else colour,
                    "images": board(folder, f"{ident}.png", colour, places[0]),
                },
            ]
    file = folder / name
    if file.suffix == ".parquet":
        for row in rows:
            shown = row.get("images")
            row["images"] = [] if shown is None else [taken(folder / str(shown))]
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_pictures_and_videos_are_trained_on_evaluated_and_shown(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = {
        "run.directory": directory,
        "run.steps": 3,
        "data.train": write_questions(tmp_path, "train.parquet", 0),
        "data.heldout": write_questions(tmp_path, "heldout.jsonl", 1),
        "data.max_prompt_tokens": 96,
        "scheduler.new_questions": 4,
        "actors.rollout.count": 1,
        "evaluation.every": 3,
        "evaluation.samples": 1,
        "checkpoints.every": 3,
    }
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert launch.main([str(EXAMPLE), *given, "--dry-run"]) == 0
    assert not (tmp_path / "media").exists(), "a dry run writes nothing"
    command = [sys.executable, "-P", "-m", "zppo.launch", str(EXAMPLE), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "media").glob("*/*.png"))) == 6
    summary = summarise(directory)
    assert summary["steps"] == 3 and summary["trained_twice"] == 0
    assert summary["heldout_after"] is not None
    steps = rollouts.step_files(directory / "rollouts")
    rows = [row for path in steps for row in rollouts.read_step(path)]
    plain = {row["question_id"]: row for row in rows if row["kind"] == "plain"}
    films = {name for name, row in plain.items() if '"kind":"video"' in row["media"]}
    assert films and films == {name for name in plain if name.endswith("-film")}
    for name, row in plain.items():
        kind, before = ("video" if name in films else "picture"), ("--1-" in name)
        assert f"[{kind} 1]" in row["prompt"] and ("[assistant]" in row["prompt"]) == before, row
    by_name = {name: row["prompt_length"] for name, row in plain.items()}
    assert {length for name, length in by_name.items() if name in films} != set(by_name.values())
    assert report.main([str(directory)]) == 0
    page = (directory / "report" / "index.html").read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    shown = json.loads(data)
    assert shown["questions"], "an untrained student finds some of these hard"
    for question in shown["questions"]:
        copies = [one["copy"] for one in question["pictures"]]
        assert len(copies) == (3 if question["id"].endswith("-film") else 1)
        assert all(shown["copies"][name].startswith("data:image/png;base64,") for name in copies)
