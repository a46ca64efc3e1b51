"""What a user can get wrong, one sentence each; what was done is kept where it is of use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from raw_data import RECIPE, first, png, second, write_recipe, write_source

from zppo.build_data import main

Row = dict[str, Any]
ROWS, OTHERS = [first(i) for i in range(3)], [second(i) for i in range(3)]


def arguments(folder: Path, **changes: Any) -> list[str]:
    given = {
        "recipe": folder / "recipe.yaml",
        "first": folder / "first",
        "second": folder / "second",
        "out": folder / "out",
    } | changes
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_recipe(tmp_path / "recipe.yaml")
    write_source(tmp_path / "first", ROWS, "jsonl")
    write_source(tmp_path / "second", OTHERS, "parquet")
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], order: list[str]) -> str:
    capsys.readouterr()
    assert main(order) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


# ---- the command ---------------------------------------------------------------------------------


def test_options_that_are_missing_or_unknown(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        (
            "recipe",
            None,
        ): "zppo build-data: the following arguments are required: --recipe; see zppo build-data --help",
        (
            "second",
            None,
        ): "zppo build-data: the recipe recipe reads first and second; expected --second FOLDER",
        ("out", None): "zppo build-data: expected --out FOLDER, where the corpus is to be",
        (
            "secnd",
            "x",
        ): "zppo build-data: there is no option --secnd (did you mean --second?); see zppo build-data --help",
        (
            "recipe",
            "zppo77",
        ): "--recipe is 'zppo77'; expected a file, or the name of a recipe that ships (did you mean 'zppo77k'?)",
        (
            "second",
            world / "nowhere",
        ): f"--second {world}/nowhere: is no folder; expected the data set",
    }
    for (name, value), sentence in cases.items():
        said = refusal(capsys, arguments(world, **{name: value}))
        assert said.replace(str(world / "recipe.yaml"), "recipe") == sentence


def test_a_source_may_be_called_like_the_beginning_of_an_option(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "rec").mkdir()
    (world / "rec" / "a.jsonl").write_text(json.dumps({"q": "1 + 1?", "a": "2"}))
    (world / "mine.yaml").write_text("sources: {rec: {columns: {question: q, answer: a}}}")
    options = [f"--recipe={world}/mine.yaml", f"--rec={world}/rec", f"--out={world}/out"]
    assert main(options) == 0
    assert "mine: 1 of 1 row kept" in capsys.readouterr().out


def test_a_limit_on_prompts_needs_a_tokenizer(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, ["--recipe=zppo77k", "--vero=a", "--mmfinereason=b", "--out=c"])
    assert said == (
        "zppo build-data: the recipe zppo77k takes prompts of up to 4096 tokens; expected "
        "--tokenizer FOLDER, the model folder whose tokens they are"
    )
    given = ["--recipe=zppo77k", "--vero=a", "--mmfinereason=b", "--out=c", "--tokenizer=models/x"]
    assert refusal(capsys, given) == (
        "--tokenizer: there is no model folder 'models/x'; expected one as save_pretrained or `hf "
        "download` writes it"
    )


def test_the_recipe_that_ships_can_be_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", "zppo77k", "--show-recipe"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert main(["--recipe", str(tmp_path / "mine.yaml"), "--show-recipe"]) == 0


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: {}", "sources is empty; expected at least one source of rows"),
        ("seed: 1", "sources is missing; expected a mapping"),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\nfilter: {}",
            "there is no setting filter (did you mean 'filters'?)",
        ),
        (
            "sources: {a: {columns: {question: q, anser: a}}}",
            "there is no setting sources.a.columns.anser (did you mean 'answer'?)",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\ntiers: [{cap: 0, sub_datasets: {}}]",
            "tiers[0].cap is 0; expected a whole number of at least 1",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}, grader: mth}}",
            "sources.a: there is no grader 'mth' (did you mean 'math'?)",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}, graders: {x: math}}}",
            "sources.a.graders translates reward types; expected sources.a.columns.reward_type to name their column",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\nfilters: {min_pictures: 1}",
            "filters.min_pictures is 1; expected sources.a.columns.images to name the column of the pictures",
        ),
        (
            "sources: {Out: {columns: {question: q, answer: a}}}",
            "sources has 'Out'; expected a name of small letters, digits and underscores other than recipe, show-recipe, tokenizer, templates, out, help, json",
        ),
        (
            "sources: {vero: {columns: {question: q, answer: a}}}\ntiers: [{cap: 1, sub_datasets: {vera: [x]}}]",
            "tiers[0].sub_datasets: there is no source 'vera' (did you mean 'vero'?)",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\ntiers: [{cap: 1, sub_datasets: {a: [AI2D]}}]",
            "tiers[0].sub_datasets.a has 'AI2D', which no row can be called; expected its canonical name 'ai2d'",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\ntiers: [{cap: 1, sub_datasets: {a: [x]}}, {cap: 2, sub_datasets: {a: [x]}}]",
            "tiers[1].sub_datasets.a has 'x' a second time; expected each name in one tier",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\ntiers: [{cap: 99999999999999999999, sub_datasets: {}}]",
            "not YAML: the whole number 99999999999999999999 does not fit into 64 bits",
        ),
        (
            "sources: {a: {columns: {question: [], answer: a}}}",
            "sources.a.columns.question is []; expected a text, or a list, each item a text",
        ),
        (
            "sources: {a: {columns: {question: q, answer: a}}}\npicture_tokens: {max_pixels: 9}",
            "picture_tokens.min_pixels is 65536; expected at most 9, the max_pixels",
        ),
    ],
)
def test_recipes(world: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    file = world / "mine.yaml"
    file.write_text(text)
    said = refusal(capsys, [f"--recipe={file}", f"--out={world / 'out'}"])
    place, _, rest = said.removeprefix(str(file)).partition(" ")
    assert (rest, place[0], place[-1]) == (sentence, ":", ":")


# ---- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_a_column_that_is_not_there(
    world: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    (world / "first" / "train-00000-of-00001.jsonl").unlink()
    rows = [{("answers" if name == "answer" else name): row[name] for name in row} for row in ROWS]
    write_source(world / "first", rows, layout)
    said = refusal(capsys, arguments(world))
    columns = (
        "data_source, answers, images, extra_info, extra_info.question, extra_info.reward_type"
    )
    assert said == (
        f"{world}/first/train-00000-of-00001.{layout}: there is no column 'answer' for "
        f"sources.first.columns.answer of the recipe (did you mean 'answers'?); it has {columns}"
    )


def test_a_folder_without_rows(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "empty" / ".cache").mkdir(parents=True)
    (world / "empty" / ".cache" / "a.parquet").touch()
    assert refusal(capsys, arguments(world, first=world / "empty")) == (
        f"--first {world}/empty: holds no file that sources.first of the recipe reads; expected "
        ".parquet, .arrow, .jsonl, .jsonl.gz, .jsonl.zst files by the patterns *"
    )


def test_patterns_of_files(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(world / "first" / "stem-x", [first(7)], "parquet")
    (world / "first" / "stem-x" / "train-00000-of-00001.parquet").rename(
        world / "first" / "stem-x" / "val-00000-of-00001.parquet"
    )
    sources = RECIPE["sources"]
    left = sources | {"first": sources["first"] | {"leave_out": ["*val-*"]}}
    write_recipe(world / "recipe.yaml", sources=left)
    assert main(arguments(world)) == 0
    assert "  first: 3 of 3 rows in 1 file\n" in capsys.readouterr().out


def test_no_picture_can_be_read(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one source; and once its pictures are there, the same command builds."""
    pictures = (world / "first" / "pictures").rename(world / "first" / "elsewhere")
    said = refusal(capsys, arguments(world))
    assert said.startswith(
        f"first: no row has pictures that can be read, 3 were tried, among them {world}/first/"
        "train-00000-of-00001.jsonl:"
    )
    assert said.endswith(
        "does not exist; expected the picture files beside the rows, as the data set has them"
    )
    assert not (world / "out" / ".build").exists()
    pictures.rename(world / "first" / "pictures")
    assert main(arguments(world)) == 0


def test_one_picture_that_cannot_be_read_is_no_reason(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(world / "second", [*OTHERS, second(9, image=png(9)[:60])], "parquet")
    assert main(arguments(world)) == 0
    said = capsys.readouterr().out
    assert "dropped: 1 with a picture that cannot be read (unreadable_picture)\n" in said
    assert (
        f"    {world}/second/train-00000-of-00001.parquet, row 4: the image is unreadable" in said
    )


def test_the_source_without_readable_pictures_is_the_one_that_is_shown(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though more rows of another have such pictures too."""
    write_source(world / "first", [*ROWS, *(first(i, images=[b"x"]) for i in range(99))], "jsonl")
    write_source(world / "second", [second(0, image=b"torn")], "parquet")
    assert refusal(capsys, arguments(world)) == (
        "second: no row has pictures that can be read, 1 were tried, among them "
        f"{world}/second/train-00000-of-00001.parquet, row 1: the image is not a picture; expected "
        "one of PNG, JPEG, WEBP, GIF, BMP, TIFF; expected the picture files beside the rows, as the "
        "data set has them"
    )


def test_pictures_from_outside_the_source_are_not_taken(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path within it may be absolute, and a file in it may be a link, as the Hub's client makes
    them."""
    outside = world / "outside.png"
    outside.write_bytes(png(50))
    inner = world / "first" / "inner.png"
    inner.symlink_to(outside)
    write_source(world / "first", [*ROWS, *(first(i) for i in (50, 51, 52))], "jsonl")
    file = world / "first" / "train-00000-of-00001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    paths = [str(inner), "../outside.png", str(outside)]
    for row, path in zip(rows[3:], paths, strict=True):
        row["images"] = [path]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(world)) == 0
    said = capsys.readouterr().out
    assert "  first: 4 of 6 rows in 1 file\n" in said
    for path in paths[1:]:
        assert f"{path[-60:]}' lies outside the source · " in said


def test_a_recipe_that_keeps_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(world / "first", [first(i, data_source="ai2") for i in range(3)], "jsonl")
    write_source(world / "second", [second(i, pass_rate=0.75) for i in range(2)], "parquet")
    assert refusal(capsys, arguments(world)) == (
        "the recipe recipe keeps none of 5 rows: 3 of a sub-dataset that no tier lists, 2 solved "
        "too often, for example 'ai2' (did you mean 'ai2d'?); expected a recipe that fits the data"
    )


# ---- the folder ----------------------------------------------------------------------------------


def test_the_folder_of_another_recipe(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(world)) == 0
    write_recipe(world / "other.yaml", seed=9)
    digests = json.loads((world / "out" / "corpus.json").read_text())["recipe_sha256"][:12]
    said = refusal(capsys, arguments(world, recipe=world / "other.yaml"))
    assert said.startswith(
        f"--out {world}/out: holds what another recipe made, recipe ({digests}…), and this is "
        "other ("
    )
    assert said.endswith("…); expected an empty folder")
    write_recipe(world / "recipe.yaml", seed=9)
    assert "another recipe of the same name made" in refusal(capsys, arguments(world))


def test_a_folder_with_other_things(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.tex").touch()
    assert refusal(capsys, arguments(world)) == (
        f"--out {world}/out: holds 'thesis.tex' and nothing of a corpus; expected an empty folder"
    )
    assert refusal(capsys, arguments(world, out="/proc/corpus")) == (
        "--out /proc/corpus: cannot be made (No such file or directory); expected a folder that can "
        "be written"
    )
    assert refusal(capsys, arguments(world, out=world / "recipe.yaml")) == (
        f"--out {world}/recipe.yaml: is a file; expected a folder"
    )
    theirs = world / "swift" / ".build" / "theirs.o"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    assert refusal(capsys, arguments(world, out=world / "swift")) == (
        f"--out {world}/swift: holds '.build/theirs.o' and nothing of a corpus; expected an empty "
        "folder"
    )
    assert theirs.exists()


def test_a_corpus_within_a_source(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, arguments(world, out=world / "first" / "out")) == (
        f"--out {world}/first/out: lies in {world}/first, the source first, and would be read as "
        "rows of it; expected a folder elsewhere"
    )


def test_a_file_that_is_a_link_to_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = world / "first" / "more.jsonl"
    link.symlink_to(world / "blob")
    assert refusal(capsys, arguments(world)) == (
        f"{link}: is a link to a file that is not there; expected the whole data set"
    )


def test_a_build_that_was_begun_with_other_data(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zppo.curation.ledger import Ledger

    def stop(self: Ledger, texts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "write", stop)
        assert main(arguments(world)) == 130
    assert capsys.readouterr().err.endswith(
        f"stopped; what was done is kept in {world}/out: the same command goes on\n"
    )
    write_recipe(world / "other.yaml", seed=9)
    other = refusal(capsys, arguments(world, recipe=world / "other.yaml"))
    assert other.startswith(f"--out {world}/out: holds what another recipe made, recipe (")

    file = world / "second" / "train-00000-of-00001.parquet"
    old = file.read_bytes(), file.stat()
    write_source(world / "second", OTHERS[:2], "parquet")
    assert refusal(capsys, arguments(world)) == (
        f"--out {world}/out: was begun with other files, the first that differs is {file.name!r} "
        "of second; expected the same files, or an empty folder"
    )

    file.write_bytes(old[0])
    os.utime(file, ns=(old[1].st_atime_ns, old[1].st_mtime_ns))
    for picture in (world / "first" / "pictures").iterdir():
        picture.write_bytes(png(777))
    assert refusal(capsys, arguments(world)) == (
        f"{world}/first/train-00000-of-00001.jsonl: has changed while the corpus was built, it or "
        "a picture of it; expected the same data, or another --out to begin again"
    )


def test_a_folder_that_cannot_be_written(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is said, and the same command goes on once there is room."""
    from zppo.curation.folder import Folder

    def full(self: Folder, picture: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "keep", full)
        assert main(arguments(world)) == 1
    assert capsys.readouterr().err.endswith(
        f"--out {world}/out: cannot be written ([Errno 28] No space left on device); what was done "
        f"is kept in {world}/out: the same command goes on\n"
    )
    assert main(arguments(world)) == 0
    assert capsys.readouterr().err.startswith(f"{world}/out: goes on behind 6 rows\n")


def test_a_source_that_vanishes(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the folder of the corpus that is to blame."""
    from zppo.curation import build as room

    file = world / "first" / "train-00000-of-00001.jsonl"

    def vanish(*arguments: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(room, "_write", vanish)
        assert main(arguments(world)) == 1
    assert capsys.readouterr().err.endswith(
        f"--first {world}/first: {file.name} cannot be read ([Errno 2] No such file or directory: "
        f"'{file}'); what was done is kept in {world}/out: the same command goes on\n"
    )


def test_rows_that_no_file_could_hold_are_reported(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a surrogate pair, a NUL, marks that would move a cursor, a line that is no JSON."""
    file = world / "first" / "train-00000-of-00001.jsonl"
    bad = json.loads(file.read_text().splitlines()[0])
    asked = ["a \\ud800 b", "a \\u0000 b", "\\u001b[2J"]
    rows = [json.dumps(bad | {"extra_info": {"reward_type": "numeric", "question": "@"}})] * 3
    lines = [row.replace('"@"', f'"{text}"') for row, text in zip(rows, asked, strict=True)]
    file.write_text(file.read_text() + "".join(f"{line}\n" for line in [*lines, "{"]))
    assert main(arguments(world)) == 0
    said = capsys.readouterr().out
    assert "dropped: 1 without a question that can be asked (question)\n" in said
    assert "dropped: 2 no row that can be read (bad_row)\n" in said
    assert "\x1b" not in said and "  first: 4 of 7 rows in 1 file\n" in said


def test_columns_of_which_each_row_has_its_own(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both layouts the first that is not null counts, whichever row comes first."""
    rows = [first(1), first(2) | {"question": "Of 2?", "extra_info": None}, first(3)]
    for row in rows:
        row.setdefault("question", None)
    found = []
    for layout in ("jsonl", "parquet"):
        for order in (rows, rows[::-1]):
            place = world / f"{layout}-{len(found)}"
            write_source(place, order, layout)
            out = world / f"out-{place.name}"
            assert main(arguments(world, first=place, out=out)) == 0
            found.append((out / "train.jsonl").read_bytes())
    assert len(set(found)) == 1 and b'"Of 2?"' in found[0]
