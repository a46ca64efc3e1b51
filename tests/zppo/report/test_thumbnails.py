"""Pictures in the report: beside their question, once, small, and only if they are what was seen."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from picture_files import coloured
from PIL import Image

from zppo.algorithm.window import Window
from zppo.data.pictures import read_picture, refer
from zppo.records import rollouts
from zppo.report import browser, load, thumbnails
from zppo.report.thumbnails import MAX_PICTURES, SIDE, Shown, Thumbnails
from zppo_protocol.values import Media, VideoReference


def encoded(*media: Media) -> str:
    return msgspec.json.encode(media).decode()


def opened(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_question_is_shown_with_its_picture(
    fake_run: Callable[..., Path], window: Window, tmp_path: Path
) -> None:
    picture = coloured(tmp_path / "a.png", "red")
    for visit in window.visits:
        visit.question = replace(visit.question, media=(picture,))
    run_dir = fake_run(steps=0)
    rollouts.write_step(run_dir / "rollouts", 4, window, {}, set())
    data = browser.browser_data(load.load_run(run_dir))
    [question] = data.questions
    [shown] = question.pictures
    assert shown.copy is not None and shown.words == "4 × 4 pixels"
    assert opened(data.copies[shown.copy]).tobytes() == read_picture(picture).tobytes()
    assert data.copies[shown.copy] in browser.embed(data)


def test_each_picture_is_carried_once_and_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    large, small = refer(tmp_path / "large.png"), coloured(tmp_path / "a.png", "red")
    made = Thumbnails()
    first, _, again = made.shown(encoded(large, small, large))
    assert first.copy == again.copy and len(made.copies) == 2
    words = [first.words, again.words]
    assert words == ["picture 1, 900 × 600 pixels", "picture 3, 900 × 600 pixels"]
    assert first.copy is not None and opened(made.copies[first.copy]).size == (SIDE, 128)
    assert made.size == sum(map(len, made.copies.values()))


def test_a_changed_or_missing_picture_is_said_and_not_shown(tmp_path: Path) -> None:
    changed, gone = coloured(tmp_path / "a.png", "red"), coloured(tmp_path / "b.png", "red")
    coloured(tmp_path / "a.png", "blue")
    Path(gone.path).unlink()
    made = Thumbnails()
    # Both have the same bytes: they are one picture, and the first reason is told.
    [first] = made.shown(encoded(changed))
    assert first.copy is None and "has changed since the data was read" in first.words
    [second] = Thumbnails().shown(encoded(gone))
    assert second == Shown(copy=None, words=f"the picture {gone.path!r} does not exist")
    assert made.copies == {}


def test_the_page_carries_only_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = coloured(tmp_path / "a.png", "red"), coloured(tmp_path / "b.png", "blue")
    made = Thumbnails()
    made.shown(encoded(first))
    monkeypatch.setattr(thumbnails, "MAX_BYTES", made.size + 10)
    [shown] = made.shown(encoded(second))
    assert shown == Shown(copy=None, words="left out, because the page carries no more pictures")


def test_frames_of_a_video_stand_with_their_times(tmp_path: Path) -> None:
    frames = [coloured(tmp_path / f"{i}.png", f"rgb({i}, 0, 0)") for i in range(40)]
    film = VideoReference(frames=tuple(frames), seconds=tuple(i / 2 for i in range(40)))
    shown = Thumbnails().shown(encoded(film))
    assert [one.words for one in shown[:2]] == ["0.0 s, 4 × 4 pixels", "1.0 s, 4 × 4 pixels"]
    assert len(shown) == MAX_PICTURES + 1 and shown[-1].words == "24 more are not shown"
    assert Thumbnails().shown(None) == []
