"""What a build leaves: the same bytes whatever the order of rows, the files they are in, their
layout, and wherever it was stopped."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from raw_data import first, png, second, write_recipe, write_source

from zppo.build_data import main
from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.data.question import digest
from zppo.errors import UserError

Row = dict[str, Any]


def rows_of_everything() -> tuple[list[Row], list[Row]]:
    """Rows for every rule, with repeats in other words, from both sources."""
    ours = [first(i, data_source=("ai2d", "tqa", "chartqa")[i % 3]) for i in range(60)]
    ours += [first(i, question=f"how long IS side {i}?", answer=f"{i}.0") for i in range(0, 40, 2)]
    ours += [first(90, images=[b"torn"]), first(91, answer="x" * 40), first(92, images=[])]
    theirs = [
        second(i, source=("AI2D", "geometry3k", "Raven")[i % 3], pass_rate=i % 5 / 4)
        for i in range(60)
    ]
    # The same question about the same picture in another sub-dataset.
    theirs += [second(i, source="Raven", pass_rate=None) for i in range(1, 40, 3)]
    return ours, theirs


def arguments(folder: Path, out: str = "out") -> list[str]:
    recipe = folder / "recipe.yaml"
    given = {"recipe": recipe, "first": folder / "first", "second": folder / "second"}
    return [
        *(part for name, value in given.items() for part in (f"--{name}", str(value))),
        *("--out", str(folder / out)),
    ]


def made(folder: Path, rows: tuple[list[Row], list[Row]], layout: str, files: int = 1) -> Path:
    folder.mkdir()
    write_recipe(folder / "recipe.yaml")
    for name, part in zip(("first", "second"), rows, strict=True):
        write_source(folder / name, part, layout, files)
    assert main(arguments(folder)) == 0
    return folder / "out"


def bytes_of(out: Path, report: bool = False) -> dict[str, str]:
    """SHA-256 of every file but the report, whose samples name places."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file() and (report or not file.name.startswith("report"))
    }


def test_neither_order_nor_files_nor_layout_matter(tmp_path: Path) -> None:
    ours, theirs = rows_of_everything()
    expected = bytes_of(made(tmp_path / "plain", (ours, theirs), "parquet"))
    assert {name.partition("/")[0] for name in expected} == {"corpus.json", "train.jsonl", "media"}
    for number, (layout, files) in enumerate([("parquet", 4), ("jsonl", 1), ("jsonl", 3)]):
        rng = random.Random(number)
        mixed = rng.sample(ours, len(ours)), rng.sample(theirs, len(theirs))
        assert bytes_of(made(tmp_path / f"mixed-{number}", mixed, layout, files)) == expected


def test_the_data_room_reads_it(tmp_path: Path) -> None:
    """Every row is good, and the digest of the questions knows what is in the pictures."""
    out = made(tmp_path / "a", rows_of_everything(), "parquet")
    corpus = load_questions(str(out), DataConfig(train="x"), Path())
    assert corpus.bad_rows == []
    assert all(len(question.media) == 1 for question in corpus.questions)
    moved = out.rename(tmp_path / "moved")
    again = load_questions(str(moved), DataConfig(train="x"), Path())
    assert digest(again.questions) == digest(corpus.questions)

    picture = next(moved.glob("media/*/*"))
    picture.write_bytes(png(12345))
    with pytest.raises(UserError, match="is not what its name, a SHA-256, says; 1 bad row where"):
        load_questions(str(moved), DataConfig(train="x"), Path())

    with (moved / "train.jsonl").open("a") as stream:
        stream.write("\n")
    with pytest.raises(UserError) as refused:
        load_questions(str(moved), DataConfig(train="x"), Path())
    assert "train.jsonl: has changed since the corpus was built (its SHA-256 is " in str(
        refused.value
    )


def test_a_finished_corpus_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path / "a", rows_of_everything(), "jsonl")
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.rglob("*")}
    first_report = capsys.readouterr().out
    assert main(arguments(tmp_path / "a")) == 0
    said = capsys.readouterr()
    assert said.out == first_report == (out / "report.txt").read_text()
    assert said.err == f"{out}: holds this corpus already, {first_rows(out)} rows; nothing to do\n"
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in before}
    assert not (out / ".build").exists()


def first_rows(out: Path) -> int:
    return len((out / "train.jsonl").read_text().splitlines())


# ---- interrupts ----------------------------------------------------------------------------------


def many(count: int) -> tuple[list[Row], list[Row]]:
    ours = [first(i, data_source="tqa" if i % 2 else "ai2d") for i in range(count)]
    return ours, [second(i, source="Raven") for i in range(count)]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "zppo", "build-data", *arguments(folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background hand it on as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_build_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """Stopped again and again, by Ctrl-C and by SIGKILL, each time a little later, it ends with the
    same bytes, the report's included."""
    rows = many(1200)
    big = {"cap": 900, "sub_datasets": {"first": ["ai2d", "tqa"], "second": ["raven"]}}
    folder = tmp_path / "stopped"
    folder.mkdir()
    write_recipe(folder / "recipe.yaml", tiers=[big])
    for name, part in zip(("first", "second"), rows, strict=True):
        write_source(folder / name, part, "parquet", 2)
    begin = time.monotonic()
    assert main(arguments(folder, "whole")) == 0
    # However fast this machine is, the first attempts are stopped before their end.
    longer = (time.monotonic() - begin) / 30

    out, stopped, begun = folder / "out", 0, set()
    for attempt in range(40):
        process = start(folder)
        assert process.stderr is not None
        begun.add(process.stderr.readline()[: len(f"{out}: goes on")])
        time.sleep(longer * attempt)
        number = (signal.SIGINT, signal.SIGKILL)[attempt % 2]
        process.send_signal(number)
        _, said = process.communicate(timeout=600)
        if (out / "corpus.json").exists():  # stopped, if at all, when all was done
            break
        stopped += 1
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
        if number == signal.SIGINT:
            assert said.endswith(f"what was done is kept in {out}: the same command goes on\n")
    assert stopped >= 3 and begun == {f"{out}: begun\n", f"{out}: goes on"}
    assert main(arguments(folder)) == 0  # the last one may have been stopped while it tidied up
    assert bytes_of(out, report=True) == bytes_of(folder / "whole", report=True)


def test_a_build_that_is_stopped_while_it_tidies_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus is whole then, and the same command removes what is left of the work."""

    def stopped(folder: Path, ignore_errors: bool = False) -> None:
        (folder / "lock").unlink()
        raise KeyboardInterrupt

    whole = bytes_of(made(tmp_path / "whole", rows_of_everything(), "parquet"), report=True)
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "out")
    with monkeypatch.context() as patched:
        patched.setattr("zppo.curation.folder.shutil.rmtree", stopped)
        assert main(arguments(folder)) == 130
    out = folder / "out"
    assert (out / "corpus.json").is_file() and (out / ".build" / "ledger.sqlite").is_file()
    assert main(arguments(folder)) == 0
    assert capsys.readouterr().err.endswith("nothing to do\n")
    there = bytes_of(out)
    assert there == {name: sha for name, sha in whole.items() if not name.startswith("report")}


def test_two_builds_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    folder = tmp_path / "a"
    folder.mkdir()
    write_recipe(folder / "recipe.yaml")
    for name, part in zip(("first", "second"), rows_of_everything(), strict=True):
        write_source(folder / name, part, "jsonl")
    (folder / "out" / ".build").mkdir(parents=True)
    with (folder / "out" / ".build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(folder)) == 2
    assert capsys.readouterr().err == (
        f"--out {folder}/out: another zppo build-data is at work there; expected one at a time\n"
    )
    assert main(arguments(folder)) == 0


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """Three times the rows, in both layouts, hold little more at their peak, by how batches of rows
    and of lines meet. What their words alone have more is 9.6 MB. `benches/build_data.py` measures whole processes of 100,000 rows."""
    peaks, words = [], "w" * 8000
    for count in (300, 900):
        ours = [first(i, question=f"{words}{i}", images=[png(i % 50)]) for i in range(count)]
        theirs = [second(i, question=f"{words}{i}", image=png(i % 50)) for i in range(count)]
        folder = tmp_path / str(count)
        folder.mkdir()
        write_recipe(folder / "recipe.yaml", tiers=[])
        write_source(folder / "first", ours, "parquet")
        write_source(folder / "second", theirs, "jsonl")
        tracemalloc.start()
        assert main(arguments(folder)) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6_500_000, peaks
