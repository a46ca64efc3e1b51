"""Pictures inside tables become files once, where whoever reads the table looks for them, and
pictures in messages are those of the row."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zppo import data_command
from zppo.config.topology import DataConfig
from zppo.data.corpus import Corpus, load_questions
from zppo.data.pictures import read_picture
from zppo.data.question import digest
from zppo.errors import UserError
from zppo_protocol.values import PictureReference

ROW = {"id": "a", "question": "How many?", "answer": "2"}
WORDS = {"type": "text", "text": "How many?"}
HERE = {"type": "image"}


def encoded(colour: str, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, format=form)
    return file.getvalue()


RED, BLUE, GREEN = encoded("red"), encoded("blue", "JPEG"), encoded("green", "WEBP")


def cell(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def load(folder: Path, *rows: dict[str, Any], unpack: bool = True, **options: Any) -> Corpus:
    file = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return read(file, unpack=unpack, **options)


def read(file: Path, *, unpack: bool = True, **options: Any) -> Corpus:
    config = DataConfig(train=str(file), **options)
    return load_questions(str(file), config, file.parent, unpack=unpack)


def load_lines(folder: Path, row: dict[str, Any]) -> Corpus:
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return read(folder / "train.jsonl")


def shas(corpus: Corpus) -> list[str]:
    """Of the pictures of the first question."""
    pictures = [one for one in corpus.questions[0].media if isinstance(one, PictureReference)]
    return [one.sha256 for one in pictures]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def reason(folder: Path, row: dict[str, Any], *more: dict[str, Any]) -> str:
    """Why the first row is bad."""
    with pytest.raises(UserError) as error:
        load(folder, row, *more)
    text = str(error.value)
    begin = f"{folder / 'train.parquet'}, row 1: "
    assert text.startswith(begin) and "; 1 bad row where" in text, text
    return text.removeprefix(begin).partition("; 1 bad row where")[0]


# ---- tables --------------------------------------------------------------------------------------


def test_pictures_of_a_table_become_files_named_by_what_is_in_them(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "black").save(tmp_path / "lies.png")
    rows = [
        {**ROW, "images": [cell(RED, "0.png"), cell(BLUE), cell(GREEN, "lies.png")]},
        {**ROW, "id": "b", "images": [cell(RED), cell(None, "lies.png"), cell(None)]},
    ]
    corpus = load(tmp_path, *rows)
    first, second = (question.media for question in corpus.questions)
    names = [
        f"{sha(content)[:2]}/{sha(content)}{suffix}"
        for content, suffix in ((RED, ".png"), (BLUE, ".jpg"), (GREEN, ".webp"))
    ]
    assert [one.path for one in first] == [str(tmp_path / "media" / name) for name in names]
    assert second[0] == first[0] and len(second) == 2
    written = {str(one.relative_to(tmp_path / "media")) for one in (tmp_path / "media").glob("*/*")}
    assert written == set(names)
    for one in (*first, *second):
        assert read_picture(one).size == (40, 30)
    # Whoever writes nothing refers to the same.
    assert read(tmp_path / "train.parquet", unpack=False).questions == corpus.questions


@pytest.mark.parametrize("value", [cell(RED, "x.png"), RED, [RED], [cell(RED)]])
def test_one_picture_or_a_list_as_a_cell_or_bytes(tmp_path: Path, value: Any) -> None:
    assert shas(load(tmp_path, {**ROW, "image": value})) == [sha(RED)]


def test_an_arrow_stream_holds_them_as_well(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**ROW, "images": [cell(RED)]}])
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    assert shas(read(tmp_path / "a.arrow")) == [sha(RED)]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    corpus = load(tmp_path, {**ROW, "image": cell(RED)}, unpack=False)
    assert shas(corpus) == [sha(RED)]
    assert [one.name for one in tmp_path.iterdir()] == ["train.parquet"]


def test_looking_at_a_table_counts_its_pictures_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path, {**ROW, "image": cell(RED)}, unpack=False)
    assert data_command.main([str(tmp_path / "train.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["train.parquet"]


def test_files_that_are_there_are_not_written_again_and_torn_ones_are(tmp_path: Path) -> None:
    row = {**ROW, "images": [cell(RED), cell(BLUE)]}
    corpus = load(tmp_path, row)
    red, blue = (Path(one.path) for one in corpus.questions[0].media)
    for file in (red, blue):
        os.utime(file, (1, 1))
    blue.write_bytes(BLUE[:50])
    os.utime(blue, (1, 1))
    load(tmp_path, row)
    assert red.stat().st_mtime == 1
    assert blue.read_bytes() == BLUE
    assert len(list((tmp_path / "media").glob("*/*"))) == 2, "nothing is left aside"


def test_the_digest_covers_what_is_in_them(tmp_path: Path) -> None:
    def told(content: bytes) -> str:
        row = {**ROW, "images": [cell(content)]}
        return digest(load(tmp_path, row, unpack=False).questions)

    assert told(RED) == told(RED) != told(GREEN)
    (tmp_path / "red.png").write_bytes(RED)
    by_path = load_lines(tmp_path, {**ROW, "images": "red.png"})
    assert digest(by_path.questions) == told(RED)


def test_they_may_be_written_elsewhere(tmp_path: Path) -> None:
    other = tmp_path / "large"
    corpus = load(tmp_path, {**ROW, "image": cell(RED)}, media_folder=str(other))
    assert read_picture(corpus.questions[0].media[0]).size == (40, 30)
    assert (other / "media").is_dir() and not (tmp_path / "media").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "media").write_text("a file")
    with pytest.raises(UserError) as error:
        load(tmp_path, {**ROW, "image": cell(RED)})
    assert str(error.value) == (
        f"{tmp_path / 'media'}: cannot be written (Not a directory), and the pictures inside the "
        "table become files there; make room for them, name another folder with "
        "data.media_folder, or copy the table to where there is room"
    )


@pytest.mark.parametrize(
    "value, why",
    [
        (
            cell(b"\x89PNG", "a.png"),
            "a picture inside the images ('image') is not a picture; expected one of PNG, JPEG, "
            "WEBP, GIF, BMP, TIFF",
        ),
        (
            [cell(RED), cell(b"")],
            "a picture inside the images ('image') is not a picture; expected one of PNG, JPEG, "
            "WEBP, GIF, BMP, TIFF",
        ),
        (
            {"bytes": base64.b64encode(RED).decode(), "path": "a.png"},
            "the images ('image') hold \"{'bytes': 'iVBORw0KGgoAAAANSUhEUgAAACgAA\"; expected a "
            "path, {image: path}, a list of these, or bytes in the cells of a table",
        ),
    ],
)
def test_cells_that_are_no_pictures(tmp_path: Path, value: Any, why: str) -> None:
    assert reason(tmp_path, {**ROW, "image": value}) == why
    assert not (tmp_path / "media" / sha(b"")[:2]).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_a_write_leaves_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stopped(self: Path, target: Path) -> None:
        assert self.read_bytes() == RED
        raise error

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises((KeyboardInterrupt, UserError)):
        load(tmp_path, {**ROW, "image": cell(RED)})
    assert [one for one in (tmp_path / "media").rglob("*") if one.is_file()] == []


@pytest.mark.parametrize("first", [{}, {"images": "red.png"}])
def test_each_row_of_lines_has_its_picture_where_it_has_it(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    rows = [{**ROW, **first}, {**ROW, "id": "b", "question": "?", "image": "red.png"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read(tmp_path / "train.jsonl").questions
    assert [len(one.media) for one in questions] == [len(first), 1]


def test_a_path_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    why = reason(tmp_path, {**ROW, "images": "loop.png"})
    assert why in (  # Python up to 3.12, and later
        "image 'loop.png' is a link that leads to itself",
        "image 'loop.png' does not exist",
    )


@pytest.mark.parametrize(
    "path",
    ["https://example.com/red.png", "FILE:///data/red.png", "data:image/png;base64,iVBORw0KGgo="],
)
@pytest.mark.parametrize("form", [lambda path: path, lambda path: [{"image": path}]])
def test_addresses_are_not_read(tmp_path: Path, path: str, form: Callable[[str], Any]) -> None:
    assert reason(tmp_path, {**ROW, "images": form(path)}) == (
        f"image {path[:40]!r} is an address, and addresses are not read; save the picture as a "
        f"file in {str(tmp_path)!r} and give its path"
    )


def test_a_colon_makes_no_address(tmp_path: Path) -> None:
    for name in ("a:b.png", "data:b.png"):
        (tmp_path / name).write_bytes(RED)
        assert shas(load_lines(tmp_path, {**ROW, "images": name})) == [sha(RED)]


def test_cells_as_verl_has_them(tmp_path: Path) -> None:
    """Of one that is not there nothing is read."""
    (tmp_path / "red.png").write_bytes(RED)
    for value in ({"image": "red.png"}, [{"image": "red.png"}, {"image": None}]):
        for corpus in (
            load(tmp_path, {**ROW, "images": value}),
            load_lines(tmp_path, {**ROW, "images": value}),
        ):
            assert shas(corpus) == [sha(RED)]


# ---- messages ------------------------------------------------------------------------------------


def asked(*content: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": list(content)}], "answer": "2", **columns}


def test_parts_take_the_pictures_of_the_row_in_order(tmp_path: Path) -> None:
    row = asked(HERE, HERE, WORDS, images=[cell(RED), cell(BLUE)])
    corpus = load(tmp_path, row)
    assert corpus.questions[0].text == "How many?"
    assert shas(corpus) == [sha(RED), sha(BLUE)]
    assert shas(load(tmp_path, asked(WORDS, HERE, images=[cell(RED)]))) == [sha(RED)]
    without = {**row, "prompt": "How many?"}
    assert load(tmp_path, without).questions[0].media == corpus.questions[0].media


@pytest.mark.parametrize("part", [{"image": "red.png"}, {"path": "red.png"}, {"image": RED}])
def test_parts_bring_pictures_of_their_own(tmp_path: Path, part: dict[str, Any]) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    row = asked({"type": "image", **part}, HERE, WORDS, images=[cell(BLUE)])
    assert shas(load(tmp_path, row)) == [sha(RED), sha(BLUE)]


@pytest.mark.parametrize("text", ["<image>How many?", "<image>\n<image> How many?", "How many?"])
def test_marks_before_the_words_are_taken_off(tmp_path: Path, text: str) -> None:
    pictures = [cell(RED), cell(BLUE)][: text.count("<image>") or 1]
    for asks in ({"question": text}, {"prompt": [{"role": "user", "content": text}]}):
        question = load(tmp_path, {"answer": "2", **asks, "images": pictures}).questions[0]
        assert (question.text, len(question.media)) == ("How many?", len(pictures))


def test_words_without_a_picture_stay_as_they_are(tmp_path: Path) -> None:
    text = "What is <image> in HTML?"
    assert load(tmp_path, {**ROW, "question": text}).questions[0].text == text


@pytest.mark.parametrize(
    "row, why",
    [
        (
            asked(HERE, HERE, WORDS, images=[cell(RED)]),
            "the question ('prompt') has 2 parts {type: image} for the row's pictures, and the "
            "images ('images') hold 1; expected as many",
        ),
        (
            asked({"type": "image", "url": "https://a.b/c.png"}, WORDS),
            "message 1 of the question ('prompt') has a picture with 'url'; expected {type: image} "
            "for the next picture of the row, or with its path or bytes",
        ),
        (
            asked({"type": "image", "image": cell(RED), "path": "red.png"}, WORDS),
            "message 1 of the question ('prompt') has a picture with 'image' and 'path'; expected "
            "{type: image} for the next picture of the row, or with its path or bytes",
        ),
        (
            {**ROW, "question": "<image><image> How many?", "images": [cell(RED)]},
            "the question ('question') holds <image> 2 times and the row has 1 picture; expected "
            "one for each picture, or none",
        ),
        (
            {**ROW, "question": "<image> ", "images": [cell(RED)]},
            "the question ('question') is empty but for <image>",
        ),
    ],
)
def test_pictures_that_have_no_place(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    assert reason(tmp_path, row) == why
