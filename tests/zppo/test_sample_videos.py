"""`zppo sample-videos`: real videos in, frames with times out, and one sentence for what is none."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import coloured
from PIL import Image

from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.data.pictures import read_picture
from zppo.data.question import digest
from zppo.sample_videos import main
from zppo_protocol.values import VideoReference, pictures_of

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None,
    reason="PyAV, which decodes videos, is not installed (the extra `video`)",
)


def dot_film(file: Path, frames: int = 12, rate: int = 4, to_the_right: bool = True) -> Path:
    """A white dot that moves over a black board, from one side to the other."""
    import av

    with av.open(str(file), mode="w") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.time_base = Fraction(1, rate)
        for index in range(frames):
            place = 4 + 4 * (index if to_the_right else frames - 1 - index)
            board = np.zeros((32, 64, 3), np.uint8)
            board[12:20, place : place + 8] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(board, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


def rows(folder: Path, *rows: object) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


ROW = {"id": "a", "question": "Which way does the dot move?", "answer": "right"}


@needs_av
def test_a_video_becomes_frames_with_times_that_training_can_read(tmp_path: Path) -> None:
    dot_film(tmp_path / "film.mp4")
    file = rows(tmp_path, {**ROW, "videos": "film.mp4"}, {**ROW, "id": "b", "question": "?"})
    assert main([str(file), "--out", str(tmp_path / "made"), "--frames", "4"]) == 0
    corpus = load_questions("made/train.jsonl", DataConfig(train=""), tmp_path)
    film, *others = corpus.questions[0].media
    assert others == [] and corpus.questions[1].media == ()
    assert isinstance(film, VideoReference)
    assert film.seconds == (0.0, 1.0, 1.75, 2.75)  # frames 0, 4, 7 and 11 at four a second
    pixels = [np.asarray(read_picture(one)).astype(float).sum(2) for one in film.frames]
    places = [(one.sum(0) * np.arange(64)).sum() / one.sum() for one in pixels]
    assert np.allclose(places, [7.5, 23.5, 35.5, 51.5], atol=1.5)


@needs_av
def test_frames_are_bounded_and_fewer_where_there_are_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dot_film(tmp_path / "film.mp4", frames=3)
    file = rows(tmp_path, {**ROW, "videos": ["film.mp4"]})
    out = tmp_path / "made"
    assert main([str(file), "--out", str(out), "--frames", "9", "--max-pixels", "512"]) == 0
    assert capsys.readouterr().out == (
        f"wrote {out / 'train.jsonl'}: rows: 1, videos: 1, of at most 9 frames\n"
    )
    [question] = load_questions("made/train.jsonl", DataConfig(train=""), tmp_path).questions
    [film] = question.media
    assert isinstance(film, VideoReference)
    assert [(one.width, one.height) for one in film.frames] == [(32, 16)] * 3


@needs_av
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Invalid data found"),
        (b"no video at all " * 99, "Invalid data found"),
        (None, "No such file"),
    ],
)
def test_what_is_no_video_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "film.mp4").write_bytes(content)
    file = rows(tmp_path, {**ROW, "videos": "film.mp4"})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{file}:1: the video {str(tmp_path / 'film.mp4')!r} cannot be read (")
    assert words in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if "made" in path.name) == []


@needs_av
def test_a_torn_video_gives_what_it_has_or_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its index stands at the end of an MP4; without it nothing can be found."""
    film = dot_film(tmp_path / "film.mp4")
    film.write_bytes(film.read_bytes()[:-300])
    file = rows(tmp_path, {**ROW, "videos": "film.mp4"})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 2
    assert "cannot be read (" in capsys.readouterr().err


@needs_av
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("film.mkv", r"it ends after \d+\.\d of 30\.0 seconds"),
        ("film.avi", r"it ends after \d+ of 120 frames"),
    ],
)
def test_the_begin_of_a_torn_video_is_not_taken_for_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    """Of a download that broke off, decoders say nothing but that it has ended."""
    film = dot_film(tmp_path / name, frames=120)
    whole = film.read_bytes()
    file = rows(tmp_path, {**ROW, "videos": name})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 0
    film.write_bytes(whole[: len(whole) * 6 // 10])
    assert main([str(file), "--out", str(tmp_path / "torn")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        re.escape(f"{file}:1: the video {str(film)!r} cannot be read (") + why + r"\)\n", said
    )


@needs_av
def test_a_video_whose_times_begin_again_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two streams one behind the other: of the second every frame would be left out."""
    film = dot_film(tmp_path / "film.ts")
    film.write_bytes(film.read_bytes() * 2)
    file = rows(tmp_path, {**ROW, "videos": "film.ts"})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err == (
        f"{file}:1: the video {str(film)!r} cannot be read (12 of its 24 frames are not later than "
        "those before them)\n"
    )


@needs_av
def test_the_column_of_one_video(tmp_path: Path) -> None:
    """As `image` is read where there is no `images`; rows that it passed by were left unsampled."""
    dot_film(tmp_path / "film.mp4")
    file = rows(tmp_path, {**ROW, "video": "film.mp4"})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 0
    [question] = load_questions("made/train.jsonl", DataConfig(train=""), tmp_path).questions
    assert [one.kind for one in question.media] == ["video"]
    assert "video" not in json.loads((tmp_path / "made/train.jsonl").read_text())
    file = rows(tmp_path, {**ROW, "videos": None, "video": "film.mp4"})
    assert main([str(file), "--out", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again/train.jsonl").read_text()
    assert again == (tmp_path / "made/train.jsonl").read_text()


@pytest.mark.parametrize("form", ["a.png", {"image": "a.png"}, {"bytes": None, "path": "a.png"}])
def test_pictures_are_copied_whatever_names_them(tmp_path: Path, form: object) -> None:
    coloured(tmp_path / "a.png", "red")
    file = rows(tmp_path, {**ROW, "image": [form]})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 0
    [question] = load_questions("made/train.jsonl", DataConfig(train=""), tmp_path).questions
    [path] = [one.path for one in pictures_of(question.media)]
    assert Path(path).is_relative_to(tmp_path / "made") and Path(path).is_file()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            '{"videos": ["a.mp4"], "video": "a.mp4"}',
            "rows.jsonl:1: has videos and video; expected one of them",
        ),
        (
            '{"videos": "https://example.com/film.mp4"}',
            "rows.jsonl:1: the video 'https://example.com/film.mp4' is an address, and addresses "
            "are not read; save it as a file in '",
        ),
        ('{"videos": 7}', "rows.jsonl:1: videos is '7'; expected a path or a list of paths"),
        ("[1]", "rows.jsonl:1: is a list; expected an object"),
        ("{", "rows.jsonl:1: is not JSON ("),
    ],
)
def test_mistakes_in_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, sentence: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines)
    assert main([str(file), "--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/{sentence}")
    assert main([str(file), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"--out: {str(tmp_path)!r} exists already; name a new folder, or remove it\n"
    )
    assert main([str(file), "--out", str(tmp_path / "made"), "--frames", "2049"]) == 2
    assert capsys.readouterr().err == ("--frames is 2049; expected at most 2048\n")


def test_without_pyav_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_av(name: str, *rest: Any, **more: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_av)
    file = rows(tmp_path, {**ROW, "videos": "film.mp4"})
    assert main([str(file), "--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err == (
        f"{file}:1: videos are read with PyAV, which is not installed; install it with: pip install "
        "zppo[video]\n"
    )


def test_files_that_were_joined_keep_their_byte_order_marks(tmp_path: Path) -> None:
    row = {**ROW, "question": "one"}
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(row)}\n" * 2 + "\ufeff\n")
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "made")]) == 0
    made = (tmp_path / "made/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in made] == [row, row]


def test_only_an_end_of_line_ends_a_row(tmp_path: Path) -> None:
    """JSON may hold the others as they are."""
    row = {**ROW, "question": "one\u2028two\x85three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n")
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "made")]) == 0
    assert json.loads((tmp_path / "made/train.jsonl").read_text()) == row


def test_pictures_of_a_row_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is read alone, wherever it lies."""
    raw, out = tmp_path / "raw", tmp_path / "elsewhere" / "made"
    (raw / "shots").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 30), colour).save(raw / "shots" / name)
    given = [
        {**ROW, "images": ["shots/a.png", "shots/b.jpg"]},
        {**ROW, "id": "b", "question": "?", "image": "shots/b.jpg"},
    ]
    assert main([str(rows(raw, *given)), "--out", str(out)]) == 0
    before, after = (
        load_questions(str(file), DataConfig(train=""), tmp_path).questions
        for file in (raw / "rows.jsonl", out / "train.jsonl")
    )
    shutil.rmtree(raw)
    assert digest(after) == digest(before)
    assert [len(one.media) for one in after] == [2, 1]
    for one in pictures_of(media for question in after for media in question.media):
        assert read_picture(one).size == (40, 30) and out in Path(one.path).parents

    capsys.readouterr()
    (tmp_path / "secret.png").write_bytes(b"")
    file = rows(tmp_path / "elsewhere", {**ROW, "images": "../secret.png"})
    assert main([str(file), "--out", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith(
        f"{file}:1: image '../secret.png' leads out of the folder {str(file.parent)!r}; expected "
    )
    assert not list(tmp_path.glob(".no*")) and not (tmp_path / "no").exists()
