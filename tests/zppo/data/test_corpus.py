"""The corpus: good rows in, bad rows listed and refused with one sentence, and an order that never
changes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zppo.config.topology import DataConfig
from zppo.data.corpus import Corpus, bad_rows_text, held_out_overlap, load_questions, shuffled
from zppo.data.pictures import picture_problem, refer
from zppo.data.question import Question, digest
from zppo.errors import UserError
from zppo_protocol.values import PictureReference, VideoReference

GOOD = {"id": "a", "question": "1 + 1?", "answer": "2"}


def write(folder: Path, *rows: object, name: str = "train.jsonl") -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def load(folder: Path, *rows: object, limit: int = 0, **options: object) -> Corpus:
    write(folder, *rows)
    config = DataConfig(train="train.jsonl", max_bad_rows=limit, **options)  # type: ignore[arg-type]
    return load_questions("train.jsonl", config, folder)


def picture(folder: Path, name: str = "square.png") -> Path:
    Image.new("RGB", (120, 120), "white").save(folder / name)
    return folder / name


def test_rows_become_questions_in_order(tmp_path: Path) -> None:
    corpus = load(tmp_path, GOOD, {"id": 7, "question": " 2 + 2? ", "answer": 4}, grader="exact")
    assert corpus.questions == [
        Question(id="a", text="1 + 1?", answer="2", grader="exact"),
        Question(id="7", text="2 + 2?", answer="4", grader="exact"),
    ]
    assert corpus.bad_rows == []


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"uid": "x", "problem": "1 + 1?", "solution": 2.5, "other": [1]}
    corpus = load(tmp_path, row, fields={"id": "uid", "question": "problem", "answer": "solution"})
    assert corpus.questions == [Question(id="x", text="1 + 1?", answer="2.5")]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    corpus = load(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        b"",
        b"  ",
        {**GOOD, "id": "b", "question": "?"},
    )
    assert [question.id for question in corpus.questions] == ["a", "b"]


def test_files_that_were_joined_keep_their_byte_order_marks(tmp_path: Path) -> None:
    first = json.dumps(GOOD).encode()
    second = json.dumps({**GOOD, "id": "b", "question": "?"}).encode()
    corpus = load(tmp_path, first, b"\xef\xbb\xbf" + second, b"\xef\xbb\xbf")
    assert [question.id for question in corpus.questions] == ["a", "b"]


def test_a_missing_id_comes_from_the_content(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    ids = [question.id for question in load(tmp_path, *rows).questions]
    turned = [question.id for question in load(tmp_path, *reversed(rows)).questions]
    assert ids == turned[::-1] and len(set(ids)) == 2
    assert ids[0] == "train-c97c3a9c9b990740"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"id": "b", "question": "?"},
            "the gold answer ('answer') is missing (valid: id, question)",
        ),
        (
            {"id": "b", "question": "?", "answers": "2"},
            "the gold answer ('answer') is missing (did you mean 'answers'?)",
        ),
        ({"id": "b", "question": "?", "answer": None}, "the gold answer ('answer') is missing"),
        ({"id": "b", "question": "?", "answer": "  "}, "the gold answer ('answer') is empty"),
        ({"id": "b", "question": "", "answer": "2"}, "the question ('question') is empty"),
        (
            {"id": "b", "question": "?", "answer": ["2"]},
            "the gold answer ('answer') is a list; expected text or a number",
        ),
        (
            {"id": "b", "question": "?", "answer": True},
            "the gold answer ('answer') is a true/false value; expected text or a number",
        ),
        (
            {"id": "b", "question": {"a": 1}, "answer": 1},
            "the question ('question') is a JSON object; expected text or a number",
        ),
        ({"id": "a", "question": "?", "answer": "2"}, "the id 'a' was used on line 1"),
        ({"id": "b", "question": " 1 +  1? ", "answer": "3"}, "asks the same as line 1"),
        (
            {"id": "", "question": "?", "answer": "2"},
            "the id ('id') is ''; expected 1 to 200 printable characters",
        ),
        (
            {"id": "x\n", "question": "?", "answer": "2"},
            "the id ('id') is 'x\\n'; expected 1 to 200 printable characters",
        ),
        (
            {"id": "b", "question": "?\0", "answer": "2"},
            "the question ('question') holds a NUL or half a surrogate pair",
        ),
        (
            {"id": "b", "question": "?", "answer": "2", "images": 3},
            "the images ('images') hold '3'; expected a path, {image: path}, a list of these, or "
            "bytes in the cells of a table",
        ),
        (
            {"id": "b", "question": "?", "answer": "2", "images": [{"image": "a.png", "size": 2}]},
            "the images ('images') hold \"{'image': 'a.png', 'size': 2}\"; expected a path, {image: "
            "path}, a list of these, or bytes in the cells of a table",
        ),
        (
            {"id": "b", "question": "?", "answer": "2", "images": "no.png"},
            "image 'no.png' does not exist",
        ),
        ([1, 2], "a list where a JSON object was expected"),
        (b"3", "a number where a JSON object was expected"),
        (
            b"{'id': 1}",
            "not a JSON value (JSON is malformed: object keys must be strings (byte 1))",
        ),
        (b'{"id": "\xff"}', "not UTF-8 text (byte 9 of the line)"),
        (
            b"[" * 100_000,
            "not a JSON value (maximum recursion depth exceeded while deserializing an object)",
        ),
    ],
)
def test_bad_rows_are_listed_and_refused(tmp_path: Path, row: object, reason: str) -> None:
    corpus = load(tmp_path, GOOD, row, limit=1)
    assert [question.id for question in corpus.questions] == ["a"]
    assert bad_rows_text(corpus) == f"line 2: {reason}\n"
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD, row)
    place = f"{tmp_path / 'train.jsonl'}:2"
    fix = "1 bad row where data.max_bad_rows allows 0: mend the file or raise the limit"
    assert str(error.value) == f"{place}: {reason}; {fix}"


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    row = rb'{"id": "b", "question": "\ud800", "answer": "2"}'
    assert len(load(tmp_path, GOOD, row, limit=1).bad_rows) == 1


def test_the_refusal_counts_all_bad_rows_and_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD, {}, {}, {}, limit=2)
    assert str(error.value).startswith(
        f"{tmp_path / 'train.jsonl'}:2: the question ('question') is missing; 3 bad rows"
    )


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UserError) as error:
        load_questions("trian.jsonl", DataConfig(train="trian.jsonl"), tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / 'trian.jsonl'}: no such question file (did you mean 'train.jsonl'?)"
    )


def test_unknown_kinds_of_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path, GOOD, name="train.txt")
    with pytest.raises(UserError) as error:
        load_questions("train.txt", DataConfig(train="train.txt"), tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'train.txt'}: unknown kind of question file '.txt' (valid: .arrow, .csv, "
        ".csv.gz, .csv.zst, .json, .json.gz, .json.zst, .jsonl, .jsonl.gz, .jsonl.zst, .parquet)"
    )


def test_an_unknown_grader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD, grader="choise")
    assert str(error.value) == "data.grader: unknown grader 'choise' (did you mean 'choice'?)"


@pytest.mark.parametrize(
    ("grader", "gold"), [("choice", "Paris"), ("math", "$ $"), ("exact", r"\boxed{$}")]
)
def test_gold_answers_that_nothing_can_meet_are_bad_rows(
    tmp_path: Path, grader: str, gold: str
) -> None:
    good = {"id": "b", "question": "Which?", "answer": "B"}
    corpus = load(tmp_path, good, {**GOOD, "answer": gold}, grader=grader, limit=1)
    reason = f"the gold answer is {gold!r}, which the grader {grader!r} can never meet"
    assert bad_rows_text(corpus) == f"line 2: {reason}\n"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, b"")
    assert (
        str(error.value)
        == f"{tmp_path / 'train.jsonl'}: holds no question; expected at least one row"
    )


def test_pictures_are_found_next_to_the_file(tmp_path: Path) -> None:
    path = picture(tmp_path)
    corpus = load(
        tmp_path,
        {**GOOD, "images": "square.png"},
        {**GOOD, "id": "b", "images": ["square.png", "square.png"]},
    )
    assert [len(question.media) for question in corpus.questions] == [1, 2]
    assert corpus.questions[0].media == (refer(path),)


def test_pictures_may_lie_in_a_folder_of_their_own_and_nowhere_else(tmp_path: Path) -> None:
    shown, data = tmp_path / "shown", tmp_path / "data"
    shown.mkdir()
    data.mkdir()
    path = picture(shown)
    (data / "link.png").symlink_to(path)
    (data / "inside.png").symlink_to(picture(data))
    assert load(data, {**GOOD, "images": "inside.png"}).questions
    for named in ("../shown/square.png", str(path), "link.png"):
        with pytest.raises(UserError) as error:
            load(data, {**GOOD, "images": named})
        assert str(error.value).startswith(
            f"{data / 'train.jsonl'}:1: image {named!r} leads out of the folder {str(data)!r}; "
            "expected a file in it, or that data.media_folder names a folder that holds it;"
        )
    [question] = load(data, {**GOOD, "images": "square.png"}, media_folder=str(shown)).questions
    assert question.media == (refer(path),)


def test_the_digest_covers_what_is_in_the_pictures_and_their_size(tmp_path: Path) -> None:
    row = {**GOOD, "images": "square.png"}
    picture(tmp_path)
    seen = {digest(load(tmp_path, row).questions)}
    seen.add(digest(load(tmp_path, row, max_pixels=1024).questions))
    Image.new("RGB", (120, 120), "black").save(tmp_path / "square.png")
    seen.add(digest(load(tmp_path, row).questions))
    seen.add(digest(load(tmp_path, GOOD).questions))
    assert len(seen) == 4
    (tmp_path / "moved").mkdir()
    picture(tmp_path / "moved")
    assert digest(load(tmp_path / "moved", row).questions) in seen


def test_bounds_of_pixels(tmp_path: Path) -> None:
    picture(tmp_path)
    row = {**GOOD, "images": "square.png"}
    for bounds, side in (({"max_pixels": 3600}, 60), ({"min_pixels": 57600}, 240)):
        [one] = load(tmp_path, row, **bounds).questions[0].media
        assert isinstance(one, PictureReference) and (one.width, one.height) == (side, side)
    with pytest.raises(UserError) as error:
        load(tmp_path, row, min_pixels=4000, max_pixels=3999)
    assert str(error.value) == "data.min_pixels is 4000; expected at most 3999, data.max_pixels"


def test_a_video_is_frames_and_times(tmp_path: Path) -> None:
    """Once more under the name of the pictures, it is another question."""
    path = str(picture(tmp_path))
    film = {"frames": ["square.png", path], "seconds": [0, 0.5]}
    rows = [{**GOOD, "videos": film}, {**GOOD, "id": "b", "images": [path, path]}]
    first, second = load(tmp_path, *rows).questions
    frame = refer(Path(path))
    assert first.media == (VideoReference(frames=(frame, frame), seconds=(0.0, 0.5)),)
    assert second.media == (frame, frame)


@pytest.mark.parametrize(
    ("film", "reason"),
    [
        (
            "film.mp4",
            "the videos ('videos') hold 'film.mp4'; expected {frames: [paths of pictures], "
            "seconds: [when each is shown]}",
        ),
        (
            {"frames": ["square.png"], "seconds": [0, 1]},
            "a video of the videos ('videos') cannot be read: seconds must have one entry per frame "
            "(1), got 2",
        ),
        ({"frames": ["gone.png"], "seconds": [0]}, "image 'gone.png' does not exist"),
        (
            {"frames": ["square.png"] * 2049, "seconds": list(range(2049))},
            "a video of the videos ('videos') has 2049 frames; at most 2048 are taken",
        ),
        *(
            (
                {"frames": ["square.png"] * 2, "seconds": seconds},
                "a video of the videos ('videos') has frames at other times than 0 to 1000000000 "
                "seconds",
            )
            for seconds in ([-0.5, 1.0], [0.0, 1.1e9], [0, 10**400])
        ),
    ],
)
def test_what_is_no_video(tmp_path: Path, film: object, reason: str) -> None:
    picture(tmp_path)
    corpus = load(tmp_path, GOOD, {**GOOD, "id": "b", "videos": [film]}, limit=1)
    assert bad_rows_text(corpus) == f"line 2: {reason}\n"


def test_the_same_words_about_other_pictures_are_another_question(tmp_path: Path) -> None:
    picture(tmp_path)
    assert len(load(tmp_path, GOOD, {**GOOD, "id": "b", "images": "square.png"}).questions) == 2


@pytest.mark.parametrize(
    "name", ["square.png", "square.jpg", "square.webp", "square.gif", "square.bmp"]
)
def test_readable_pictures_pass(tmp_path: Path, name: str) -> None:
    assert picture_problem(picture(tmp_path, name)) is None


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_pictures_do_not(tmp_path: Path, kind: str) -> None:
    path = picture(tmp_path, f"square.{kind}")
    path.write_bytes(path.read_bytes()[:-40])
    assert str(picture_problem(path)).startswith("is unreadable")


def test_what_is_no_picture_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("hello")
    assert (
        picture_problem(tmp_path / "x.png")
        == "is not a picture; expected one of PNG, JPEG, WEBP, GIF, BMP, TIFF"
    )
    assert picture_problem(tmp_path) == "does not exist"


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = picture(tmp_path)
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(bomb))
    assert picture_problem(path) == "has more than 100000000 pixels"


def test_held_out_overlap(tmp_path: Path) -> None:
    train = [
        Question(id="a", text="How  much?", answer="1"),
        Question(id="b", text="Else?", answer="2"),
    ]
    assert held_out_overlap(train, [Question(id="z", text="how much? ", answer="1")]) == ["a"]
    assert held_out_overlap(train, []) == []


@given(st.integers(0, 500), st.integers(0, 2**40), st.integers(0, 1000))
def test_shuffled_is_a_permutation_and_repeats_itself(n: int, seed: int, epoch: int) -> None:
    order = shuffled(n, seed, epoch)
    assert order.dtype == np.int64 and sorted(order) == list(range(n))
    assert np.array_equal(order, shuffled(n, seed, epoch))


def test_shuffled_never_changes() -> None:
    assert shuffled(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert shuffled(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert shuffled(8, 1, 0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]


def test_columns_that_no_layout_knows_are_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"instruction": "?", "output": "1"}\n')
    with pytest.raises(UserError) as caught:
        load_questions("train.jsonl", DataConfig(train="train.jsonl", max_bad_rows=9), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'train.jsonl'}: holds no question; expected at least one row, and line 1: the "
        "question ('question') is missing (did you mean 'instruction'?); name its column in "
        "data.fields"
    )
