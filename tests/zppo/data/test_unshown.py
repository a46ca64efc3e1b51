"""Pictures and videos in columns that nobody reads are said, and those that somebody reads are
not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import coloured

from zppo import data_command
from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions, source_notes

ASKED = {"question": "What is it?", "answer": "red"}
FILM = {"frames": ["a.png"], "seconds": [0.0]}
LEFT = (
    "{asked} asked without the picture or video of the column {column!r}; name it in data.fields "
    "(images or videos), or leave it out of the file"
)


def notes(file: Path, **options: Any) -> list[str]:
    config = DataConfig(train=str(file), **options)
    return source_notes("data.train", load_questions(str(file), config, Path.cwd()))


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    coloured(folder / "a.png", "red")
    file = folder / "train.jsonl"
    file.write_text("".join(f"{json.dumps({**ASKED, **row})}\n" for row in rows))
    return file


def parquet(folder: Path, **columns: Any) -> Path:
    file = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist([{**ASKED, **columns}]), file)
    return file


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("picture", "a.png"),
        ("image_1", ["photos/a.JPG"]),
        ("video", "films/a.mp4"),
        ("film", FILM),
        ("pictures", [{"bytes": None, "path": "a.webp"}]),
        ("picture", {"image": "a.png"}),
    ],
)
def test_a_column_that_nobody_reads(tmp_path: Path, column: str, value: object) -> None:
    rows = [{"question": f"What is it, {i}?", column: value} for i in range(2)]
    rows += [{"images": ["a.png"], column: value}, rows[0]]
    said = LEFT.format(asked="2 questions are", column=column)
    assert notes(jsonl(tmp_path, *rows), max_bad_rows=1) == [f"data.train: {said}"]


def test_an_empty_column_beside_one_with_a_picture(tmp_path: Path) -> None:
    """The first of the two names is read, and shows nothing."""
    said = LEFT.format(asked="1 question is", column="image")
    assert notes(jsonl(tmp_path, {"images": [], "image": "a.png"})) == [f"data.train: {said}"]


def test_both_columns_of_pictures(tmp_path: Path) -> None:
    """Those of `images` are shown; what else lies in `image` is said."""
    said = LEFT.format(asked="1 question is", column="image")
    coloured(tmp_path / "b.png", "blue")
    both = {"images": ["a.png"], "image": "b.png"}
    assert notes(jsonl(tmp_path, both)) == [f"data.train: {said}"]
    assert notes(jsonl(tmp_path, {**both, "images": ["a.png", {"image": "b.png"}]})) == []
    assert notes(jsonl(tmp_path, {**both, "image": "blue"})) == []
    assert notes(jsonl(tmp_path, both), fields={"images": "images"}) == []
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    assert notes(parquet(tmp_path, images=[cell], image=cell)) == [f"data.train: {said}"]
    assert notes(parquet(tmp_path, images=[cell], image="b.png", thumbnail=cell)) == []


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"images": ["a.png"], "picture": "a.png"},
        {"url": "https://example.com/a.png"},
        {"source": "see a.png and b.png\nor c.png", "score": 3, "tags": ["png", None], "more": {}},
        {"picture": {"bytes": None, "path": None}},
        {"picture": {"image": "https://example.com/a.png"}, "more": {"image": "a picture"}},
        {"question": "Which of a.png", "answer": "b.png"},
    ],
)
def test_nothing_is_left(tmp_path: Path, row: dict[str, Any]) -> None:
    assert notes(jsonl(tmp_path, row)) == []


def test_who_says_where_the_pictures_are_is_told_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"picture": "a.png"}, {"question": "And this?", "image_1": "a.png"})
    assert notes(file, fields={"images": "picture"}) == []


def test_a_column_of_pictures_in_a_table(tmp_path: Path) -> None:
    """It is known by its type: only the columns in use are read."""
    coloured(tmp_path / "a.png", "red")
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    for column, value in (("picture", cell), ("pictures", [cell])):
        said = LEFT.format(asked="1 question is", column=column)
        assert notes(parquet(tmp_path, **{column: value})) == [f"data.train: {said}"]
    assert notes(parquet(tmp_path, image=cell, thumbnail=cell)) == []
    assert notes(parquet(tmp_path, picture={"bytes": b"", "width": 2})) == []


def test_looking_at_data_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = jsonl(tmp_path, {"question": "And this?", "film": "a.mp4"}).rename(
        tmp_path / "held.jsonl"
    )
    file = jsonl(tmp_path, {"picture": "a.png"})
    assert data_command.main([str(file), "--heldout", str(held)]) == 0
    said = LEFT.format(asked="1 question is", column="film")
    assert capsys.readouterr().out.endswith(
        f"  held out      1 question, 0 of them here as well\n                {said}\n"
    )
    assert data_command.main([str(file)]) == 0
    said = LEFT.format(asked="1 question is", column="picture")
    assert f"  not shown     {said}\n" in capsys.readouterr().out
    assert data_command.main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unshown"] == {"picture": 1}
