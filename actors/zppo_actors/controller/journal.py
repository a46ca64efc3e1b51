"""The journal: what was dispatched, what was trained, and what happened, in `journal.sqlite` of the
run directory.

It is the witness of the exactly-once promise, so it only records and never prevents: a group that
is trained twice is inserted twice and shows in `counts`. Every call is one transaction in WAL mode:
a killed process loses at most the call it was in, and a reader (report, summary) is never in the
way of the run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from zppo.records.ledger import (
    JOURNAL,
    JOURNAL_SCHEMA,
    SETTLED_IN_ORDER,
    JournalCounts,
    Spending,
    aside_of,
    begins_anew,
    find_problem,
    first_step,
    has_table,
    journal_counts,
    journal_id,
    set_first_step,
    set_journal_id,
    spent,
)

TrainedRow = tuple[int, str, str, str, str]
"""(window, group_id, question_id, kind, origin)"""


class Journal:
    """Opens or creates the journal of a run directory that goes on from `start_step`. Used from one
    thread of one process, the controller.

    One that cannot vouch for the steps before is set aside, so that no attempt dies of it,
    and the new one knows from which step it counts; `renewed` says so in a sentence.
    """

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        problem = find_problem(run_dir, start_step)
        self.renewed = None if problem is None else begins_anew(run_dir, problem, start_step)
        path = run_dir / JOURNAL
        if problem is not None:
            _set_aside(path)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        begun = has_table(self._connection, "trained")
        before = begun and not has_table(self._connection, "settled")
        if not begun:
            set_journal_id(self._connection, journal_id(run_dir))
        # As a whole: a table of settled windows that is not filled would vouch for nothing.
        filled = SETTLED_IN_ORDER if before else ""
        self._connection.executescript(f"BEGIN IMMEDIATE; {JOURNAL_SCHEMA} {filled} COMMIT;")
        if problem is not None:
            set_first_step(self._connection, start_step)

    def together(self) -> _transaction:
        """What is recorded in its block is recorded as a whole or not at all, and faster."""
        return _transaction(self._connection)

    def record_dispatched(self, question_id: str, window: int, epoch: int = 0) -> None:
        """A new question (X_new) of pass `epoch` entered a window. Saying it again for the same
        window, as a resumed controller does for the windows it restored, changes nothing."""
        self._connection.execute(
            "INSERT OR IGNORE INTO dispatched VALUES (?, ?, ?)", (question_id, window, epoch)
        )

    def record_trained(self, step: int, rows: Iterable[TrainedRow], settled: Iterable[int]) -> None:
        """The groups that entered the loss of one step, and the windows of which nothing is left;
        all of them or none are recorded."""
        with _transaction(self._connection):
            self._connection.executemany(
                "INSERT INTO trained VALUES (?, ?, ?, ?, ?, ?)", ((step, *row) for row in rows)
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO settled VALUES (?, ?)",
                ((window, step) for window in settled),
            )

    def record_event(self, wall_time: float, actor: str, event: str, detail: str = "") -> None:
        """Something worth keeping: `wall_time` in seconds since the epoch, `event` a short
        snake_case word.

        The event `run_ended` carries the verdict that the summary shows.
        """
        self._connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?)", (wall_time, actor, event, detail)
        )

    def record_cost(self, kind: str, requests: int, tokens: int) -> None:
        """A teacher's work has cost so much more. It is never rolled back: the money is gone."""
        self._connection.execute(
            "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (kind) DO UPDATE SET "
            "requests = requests + excluded.requests, tokens = tokens + excluded.tokens",
            (kind, requests, tokens),
        )

    def spent(self) -> dict[str, Spending]:
        """What teachers have cost, by kind of work."""
        return spent(self._connection)

    def roll_back(self, step: int) -> None:
        """On resume from the checkpoint before `step`: forget what the lost policy had trained and
        was asked for; not of a window of which a part is trained before."""
        with _transaction(self._connection):
            self._connection.execute("DELETE FROM trained WHERE step >= ?", (step,))
            self._connection.execute("DELETE FROM settled WHERE step >= ?", (step,))
            self._connection.execute(
                "DELETE FROM dispatched WHERE window >= ? AND NOT EXISTS (SELECT 1 FROM trained "
                "WHERE trained.question_id = dispatched.question_id "
                "AND trained.window = dispatched.window)",
                (step,),
            )
            set_first_step(self._connection, min(step, first_step(self._connection)))

    def count(self, event: str) -> int:
        """How many events of this name there were, over all attempts at the run."""
        return int(
            self._connection.execute(
                "SELECT COUNT(*) FROM events WHERE event = ?", (event,)
            ).fetchone()[0]
        )

    def sync(self) -> None:
        """Force everything recorded so far to the disk."""
        self._connection.execute("PRAGMA wal_checkpoint(FULL)")

    def counts(self) -> JournalCounts:
        """(trained_twice, lost): groups or new questions trained more than once; new questions that
        were dropped."""
        return journal_counts(self._connection)

    def events(self, limit: int = 100) -> list[tuple[float, str, str, str]]:
        """The latest events, oldest first, as (wall_time, actor, event, detail)."""
        query = (
            "SELECT * FROM (SELECT rowid, * FROM events ORDER BY rowid DESC LIMIT ?) ORDER BY rowid"
        )
        return [tuple(row[1:]) for row in self._connection.execute(query, (limit,))]

    def close(self) -> None:
        self._connection.close()


def _set_aside(path: Path) -> None:
    """Move a journal to a free name, with the files in which SQLite keeps what is not merged."""
    aside = aside_of(path)
    for suffix in ("-wal", "-shm", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))


class _transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK if the block raises; autocommit stays the rule
    elsewhere."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.execute("ROLLBACK" if kind else "COMMIT")
