"""The ledger: what `journal.sqlite` of a run directory vouches for, and from which step on.

The journal counts, independently of the scheduler that keeps it, the promise that each question is
trained exactly once. Invariant: it vouches only for what it saw. A journal that is missing, damaged
or ends too early is named and counts nothing; the one that takes its place knows the first step it
sees (SQLite's `user_version` holds it, 0 in a run that never lost its journal). Nor does it vouch
for another run: its `application_id` is a number that `run.json` holds too.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from zppo.errors import UserError

JOURNAL = "journal.sqlite"
MAX_JOURNAL_ID = 2**31 - 1
"""What `application_id` can hold."""
JOURNAL_SCHEMA = """
CREATE TABLE IF NOT EXISTS trained (
    step INTEGER NOT NULL, window INTEGER NOT NULL, group_id TEXT NOT NULL,
    question_id TEXT NOT NULL, kind TEXT NOT NULL, origin TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS trained_by_question ON trained (question_id, window);
CREATE TABLE IF NOT EXISTS dispatched (
    question_id TEXT NOT NULL, window INTEGER NOT NULL, epoch INTEGER NOT NULL,
    PRIMARY KEY (question_id, window)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settled (window INTEGER PRIMARY KEY, step INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    wall_time REAL NOT NULL, actor TEXT NOT NULL, event TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spent (
    kind TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL) WITHOUT ROWID;
"""
"""`trained` has no uniqueness on purpose: a group that is trained twice must show up twice. A
question of a trained window that had nothing to train (no correct teacher response to learn from,
say) has one row of kind `none`, so every trained step has a row. `window` is the one that the
question was opened in. `settled` are the windows of which the scheduler says that nothing is left
to train, with the step that trained the last of it."""

SETTLED_IN_ORDER = "INSERT INTO settled SELECT window, MAX(step) FROM trained GROUP BY window;"
"""Fills the table from what was trained while each step trained one window."""

_GROUPS_TRAINED_TWICE = """
SELECT COUNT(*) FROM (SELECT 1 FROM trained GROUP BY question_id, window, kind HAVING COUNT(*) > 1)
"""
# A question is new once per pass over the corpus, so two windows of one epoch must not both have
# trained it as new.
_QUESTIONS_TRAINED_TWICE = """
SELECT COUNT(*) FROM (
    SELECT 1 FROM trained LEFT JOIN dispatched USING (question_id, window)
    WHERE origin = 'new'
    GROUP BY question_id, COALESCE(epoch, 0) HAVING COUNT(DISTINCT window) > 1)
"""
_LOST = """
SELECT COUNT(*) FROM dispatched WHERE {over} AND NOT EXISTS (
    SELECT 1 FROM trained
    WHERE trained.question_id = dispatched.question_id AND trained.window = dispatched.window)
"""
_SETTLED = "window IN (SELECT window FROM settled)"
_SETTLED_IN_ORDER = "window <= (SELECT MAX(window) FROM trained)"
"""The same in a journal that has no table of them: there each step trained one window."""
_LAST_WORD = "SELECT detail FROM events WHERE event = 'run_ended' ORDER BY rowid DESC LIMIT 1"
_SPENT = "SELECT kind, requests, tokens FROM spent ORDER BY kind"
_HAS_TABLE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
_WRONG_CONTENT = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR")
"""Errors that the bytes of the file are to blame for; the others (locked, no permission) pass."""


class JournalCounts(NamedTuple):
    """Violations of exactly-once; both are 0 in a correct run."""

    trained_twice: int
    lost: int


class Ledger(Struct, frozen=True, kw_only=True):
    """What a run's journal says. Counts and `from_step` are None where it has a `problem`."""

    trained_twice: int | None = None
    lost: int | None = None
    from_step: int | None = None
    """the first step that was counted; 0: the whole run"""
    problem: str | None = None
    """e.g. `is missing`"""
    verdict: str | None = None
    """the last word of the controller"""
    spent: dict[str, Spending] = {}
    """what the teachers have cost, by kind of work"""


def journal_counts(connection: sqlite3.Connection) -> JournalCounts:
    """Count groups and new questions trained more than once, and dispatched new questions that were
    never trained."""

    def one(query: str) -> int:
        return int(connection.execute(query).fetchone()[0])

    over = _SETTLED if has_table(connection, "settled") else _SETTLED_IN_ORDER
    twice = one(_GROUPS_TRAINED_TWICE) + one(_QUESTIONS_TRAINED_TWICE)
    return JournalCounts(twice, one(_LOST.format(over=over)))


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    """False in the journal of a version that did not know of it."""
    return connection.execute(_HAS_TABLE, (name,)).fetchone() is not None


class Spending(NamedTuple):
    """What teachers have cost, for one kind of work."""

    requests: int
    tokens: int


def spent(connection: sqlite3.Connection) -> dict[str, Spending]:
    """What teachers have cost since the journal began, by kind of work, in lost attempts too."""
    if not has_table(connection, "spent"):
        return {}
    return {str(kind): Spending(int(n), int(t)) for kind, n, t in connection.execute(_SPENT)}


def first_step(connection: sqlite3.Connection) -> int:
    """The first step that the journal saw."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def set_first_step(connection: sqlite3.Connection, step: int) -> None:
    connection.execute(f"PRAGMA user_version = {int(step)}")


class _Owner(Struct):
    """The part of `run.json` that names its journal."""

    journal_id: int = 0


def journal_id(run_dir: Path) -> int:
    """The number that the journal of a run must have; 0 where `run.json` has none, or is not there
    or damaged, which whoever reads the run will say."""
    try:
        return msgspec.json.decode((run_dir / "run.json").read_bytes(), type=_Owner).journal_id
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return 0


def set_journal_id(connection: sqlite3.Connection, number: int) -> None:
    connection.execute(f"PRAGMA application_id = {int(number)}")


def read_ledger(run_dir: Path, steps: int) -> Ledger:
    """What vouches for the `steps` trained steps of a run. A run that trained nothing needs no
    journal.

    Raises UserError if the file cannot be opened.
    """
    problem = find_problem(run_dir, steps)
    if problem is not None:
        return Ledger(problem=problem)
    if not _is_there(run_dir / JOURNAL):
        return Ledger(trained_twice=0, lost=0, from_step=0)
    with closing(_opened(run_dir / JOURNAL)) as connection:
        word = connection.execute(_LAST_WORD).fetchone()
        return Ledger(
            **journal_counts(connection)._asdict(),
            from_step=first_step(connection),
            verdict=None if word is None else str(word[0]),
            spent=spent(connection),
        )


def find_problem(run_dir: Path, steps: int) -> str | None:
    """Why the journal cannot vouch for the `steps` trained steps of a run, or None.

    Reads the whole file. Raises UserError if it cannot be opened.
    """
    path = run_dir / JOURNAL
    if not _is_there(path):
        return "is missing" if steps > 0 else None
    try:
        with closing(_opened(path)) as connection:
            checked = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            seen = connection.execute("SELECT MAX(step) FROM trained").fetchone()[0]
            seen = first_step(connection) if seen is None else int(seen) + 1
            number = int(connection.execute("PRAGMA application_id").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if not error.sqlite_errorname.startswith(_WRONG_CONTENT):
            raise UserError(f"{path}: cannot be opened ({error})") from None
        return f"is damaged ({error})"
    if checked != "ok":
        return f"is damaged ({checked.splitlines()[-1]})"
    if number != (journal_id(run_dir) or number):
        return "is that of another run"
    return None if seen >= steps else f"ends before step {seen}"


def _opened(path: Path) -> sqlite3.Connection:
    """The journal, to be read. Where this user may write it is opened as if to be written: the
    first reader after a crash must be able to replay the write-ahead log. Elsewhere SQLite could
    not make the files that it reads such a journal with, and need not if there is no log."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return sqlite3.connect(path)
    log = path.with_name(f"{path.name}-wal")
    how = "mode=ro" if _is_there(log) else "immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)


def begins_anew(run_dir: Path, problem: str, step: int) -> str:
    """The sentence for a journal with a problem when the run goes on from `step`."""
    path = run_dir / JOURNAL
    kept = f", the old one is kept as {aside_of(path).name}" if _is_there(path) else ""
    return f"{path} {problem}: a new one counts from step {step} on{kept}"


def aside_of(path: Path) -> Path:
    """Where a damaged journal goes: the first free name."""
    names = (path.with_name(f"{path.stem}.damaged-{n}{path.suffix}") for n in count(1))
    return next(name for name in names if not name.exists())


def _is_there(path: Path) -> bool:
    """Whether there is a journal; an empty file is one that nobody has begun."""
    return path.exists() and path.stat().st_size > 0
