"""What the journal vouches for: nothing that it did not see."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from worlds import topology

from zppo.errors import UserError
from zppo.records import run_directory
from zppo.records.ledger import Ledger, begins_anew, find_problem, read_ledger
from zppo.records.summary import summarise
from zppo.report.load import load_run
from zppo.report.page import tiles
from zppo.report.sentences import sentences
from zppo_actors.controller.journal import Journal

GARBAGE = b"not a database, and longer than its header would be" * 40


def journal_of(folder: Path, steps: int) -> Path:
    """The journal of a run that trained so many steps, closed."""
    journal = Journal(folder)
    for step in range(steps):
        journal.record_dispatched(f"q{step}", step)
        rows = [(step, f"{step}/q{step}/{i}", f"q{step}", f"kind-{i}", "new") for i in range(50)]
        journal.record_trained(step, rows, [step])
    journal.record_event(0.0, "controller", "run_ended", "finished")
    journal.close()
    return folder / "journal.sqlite"


def test_a_whole_journal_vouches_for_all_steps(tmp_path: Path) -> None:
    journal_of(tmp_path, 3)
    whole = Ledger(trained_twice=0, lost=0, from_step=0, verdict="finished")
    assert read_ledger(tmp_path, 3) == read_ledger(tmp_path, 2) == whole


def test_a_run_that_trained_nothing_needs_no_journal(tmp_path: Path) -> None:
    assert read_ledger(tmp_path, 0) == Ledger(trained_twice=0, lost=0, from_step=0)
    (tmp_path / "journal.sqlite").touch()
    assert find_problem(tmp_path, 0) is None
    assert find_problem(tmp_path, 1) == "is missing"


def overwrite(path: Path) -> None:
    path.write_bytes(GARBAGE)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5000)


def scribble(path: Path) -> None:
    """Break a page in the middle and leave the header as it is."""
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096)


def another_database(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.commit()
    connection.close()


DAMAGES = [overwrite, cut, scribble, another_database]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_vouches_for_nothing(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(journal_of(tmp_path, 3))
    ledger = read_ledger(tmp_path, 3)
    assert str(ledger.problem).startswith("is damaged (")
    assert ledger == Ledger(problem=ledger.problem)


def test_a_journal_that_ends_too_early_vouches_for_nothing(tmp_path: Path) -> None:
    """It was put back from a copy of an earlier time."""
    journal_of(tmp_path, 3)
    assert read_ledger(tmp_path, 5) == Ledger(problem="ends before step 3")


def test_the_journal_of_somebody_else_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would make files beside it, which a folder that may not be written does not take: one
    that a run has left, and one that is being written."""
    for mode in (0o555, 0o755):
        whole = Ledger(trained_twice=0, lost=0, from_step=0, verdict="finished")
        run = tmp_path / f"a run {mode}"
        run.mkdir()
        path = journal_of(run, 3)
        writing = sqlite3.connect(path) if mode == 0o755 else None
        if writing is not None:
            writing.execute("INSERT INTO events VALUES (1.0, 'controller', 'checkpoint', '')")
            writing.commit()
        before = sorted(run.iterdir())
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        run.chmod(mode)  # which binds nobody who runs the tests as root
        assert read_ledger(run, 3) == whole
        assert sorted(run.iterdir()) == before
        run.chmod(0o755)
        monkeypatch.undo()
        if writing is not None:
            writing.close()


def test_a_journal_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    path = journal_of(tmp_path, 1)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError) as caught:
        find_problem(tmp_path, 1)
    connection.close()
    assert str(caught.value) == f"{path}: cannot be opened (database is locked)"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_set_aside_and_the_new_one_knows_where_it_begins(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = journal_of(tmp_path, 3)
    damage(path)
    kept, problem = path.read_bytes(), str(find_problem(tmp_path, 3))
    for number in (1, 2):
        sentence = (
            f"{path} {problem}: a new one counts from step 3 on, the old one is kept as "
            f"journal.damaged-{number}.sqlite"
        )
        assert begins_anew(tmp_path, problem, 3) == sentence
        journal = Journal(tmp_path, 3)
        assert journal.renewed == sentence
        assert (tmp_path / f"journal.damaged-{number}.sqlite").read_bytes() == kept
        journal.record_trained(3, [(3, "3/q/plain", "q", "plain", "new")], [3])
        journal.close()
        assert read_ledger(tmp_path, 4) == Ledger(trained_twice=0, lost=0, from_step=3)
        path.write_bytes(kept)


def test_a_missing_journal_begins_anew_and_reaches_back_when_the_run_does(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 6)
    assert (
        journal.renewed == f"{tmp_path}/journal.sqlite is missing: a new one counts from step 6 on"
    )
    journal.roll_back(6)
    journal.close()
    assert read_ledger(tmp_path, 6).from_step == 6
    journal = Journal(tmp_path, 6)
    assert journal.renewed is None
    journal.roll_back(4)  # of two checkpoints the later one was torn
    journal.close()
    assert read_ledger(tmp_path, 4).from_step == 4


def test_a_journal_of_another_run_vouches_for_nothing(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for run in (mine, other):
        run_directory.create(run, topology())
        journal_of(run, 3)
        assert find_problem(run, 3) is None
    shutil.copy(other / "journal.sqlite", mine / "journal.sqlite")
    assert read_ledger(mine, 3) == Ledger(problem="is that of another run")
    run_directory.renew(mine, 3)
    journal = Journal(mine, 3)
    assert journal.renewed == (
        f"{mine}/journal.sqlite is that of another run: a new one counts from step 3 on, the old "
        "one is kept as journal.damaged-1.sqlite"
    )
    journal.close()
    assert find_problem(mine, 3) is None, "the new one is its own"


def test_a_run_of_a_version_that_bound_no_journals_goes_on_with_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = run_directory.create(run, topology())
    run_directory.write(run, msgspec.structs.replace(record, journal_id=0))
    with closing(sqlite3.connect(journal_of(run, 3))) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (0,)
    run_directory.renew(run, 3)
    journal = Journal(run, 3)
    assert journal.renewed is None and find_problem(run, 3) is None
    journal.close()


@pytest.mark.slow
def test_report_and_summary_say_what_the_journal_is_worth(fake_run: Callable[..., Path]) -> None:
    run = fake_run(steps=4)

    def said() -> tuple[object, ...]:
        data = load_run(run)
        return tiles(data.summary)[-1], sentences(data)[-1]

    whole = (
        "Every new question was trained exactly once: none was lost, no group was trained twice."
    )
    assert said() == (("kept", "exactly-once", "0 trained twice, 0 lost"), whole)
    path = run / "journal.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    since = "0 trained twice, 0 lost, from step 2 on"
    assert said() == (
        ("kept", "exactly-once", since),
        f"From step 2 on, where the journal begins: {whole}",
    )
    path.unlink()
    assert said() == (
        ("unknown", "exactly-once", "the journal is missing"),
        "Nothing vouches for it that every question was trained exactly once: the journal is "
        "missing.",
    )
    summary = summarise(run)
    keys = ("trained_twice", "lost", "journal_from_step", "journal_problem", "verdict")
    assert [summary[key] for key in keys] == [None, None, None, "is missing", None]
