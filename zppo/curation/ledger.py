"""What a build has done so far, in one SQLite file: how far each file was read, which rows may be
kept and where they stand, what was dropped by which rule.

The invariant: what a transaction holds is one batch of rows and the count of rows it ends at, so a
build that is killed goes on behind the last whole batch. Memory does not grow with the rows: they
are on the disk, and the order that a cap goes by is made there. Nothing that is kept depends on the
order of rows: of two rows with one identity the one of the lower rank stays, of too many rows of a
sub-dataset those of the lowest lots, and rank and lot follow from what is in the row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from zppo.curation.examples import RULES

SAMPLES = 5
"""Dropped rows that are remembered of each rule and source."""
PAGE = 500
"""Rows that are fetched at once."""
_UNLISTED = ("bad_row", "not_listed", "earlier_source")
"""Rules whose rows do not make their sub-dataset one that the source has."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards
  (shard INTEGER PRIMARY KEY, done INTEGER, rows INTEGER, whole INTEGER);
CREATE TABLE IF NOT EXISTS names (source TEXT, name TEXT, PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drops
  (rule TEXT, source TEXT, name TEXT, rows INTEGER, PRIMARY KEY (rule, source, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples
  (rule TEXT, source TEXT, lot BLOB, place TEXT, name TEXT, question TEXT, detail TEXT,
   PRIMARY KEY (rule, source, lot, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS candidates
  (identity BLOB PRIMARY KEY, rank BLOB, lot BLOB, source TEXT, name TEXT, shard INTEGER,
   row INTEGER, place TEXT)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chosen
  (identity BLOB PRIMARY KEY, lot BLOB, source TEXT, name TEXT, shard INTEGER, row INTEGER,
   text BLOB)
  WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chosen_place ON chosen (shard, row);
"""

_CAPPED = (
    "FROM candidates WHERE NOT EXISTS "
    "(SELECT 1 FROM chosen WHERE chosen.identity = candidates.identity)"
)


class Candidate(Struct, frozen=True, kw_only=True):
    """A row that every rule lets pass: what it is the same by, what it goes before others by, and
    where it stands."""

    identity: bytes
    rank: bytes
    lot: bytes
    source: str
    name: str
    shard: int
    row: int
    place: str
    """for people"""


class Drop(Struct, frozen=True, kw_only=True):
    """A row that is left out. `place` and `question` are for people."""

    rule: str
    source: str
    name: str
    detail: str
    place: str
    question: str
    lot: bytes


class Chosen(Struct, frozen=True, kw_only=True):
    """A row that the corpus holds."""

    identity: bytes
    row: int


class Ledger:
    """One build; the file is opened by one process at a time."""

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(file, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA cache_size = -4096")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    # ---- facts -----------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        found = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if found is None else str(found[0])

    def note(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # ---- rows in ---------------------------------------------------------------------------------

    def done(self, shard: int) -> tuple[int, bool]:
        """The number of the last row that was looked at, and whether it was the file's last."""
        found = self._one("SELECT done, whole FROM shards WHERE shard = ?", shard)
        return (0, False) if found is None else (int(found[0]), bool(found[1]))

    def record(
        self, shard: int, outcomes: Sequence[Candidate | Drop], done: int, whole: bool = False
    ) -> None:
        """One batch of rows up to the number `done`, all or nothing."""
        with _transaction(self._db):
            for outcome in outcomes:
                if isinstance(outcome, Candidate):
                    self._offer(outcome)
                else:
                    self._drop(outcome)
                if isinstance(outcome, Candidate) or outcome.rule not in _UNLISTED:
                    self._db.execute(
                        "INSERT OR IGNORE INTO names VALUES (?, ?)", (outcome.source, outcome.name)
                    )
            self._trim({"duplicate", *(one.rule for one in outcomes if isinstance(one, Drop))})
            self._db.execute(
                "INSERT INTO shards VALUES (?1, ?2, ?3, ?4) ON CONFLICT (shard) DO UPDATE "
                "SET done = ?2, rows = rows + ?3, whole = ?4",
                (shard, done, len(outcomes), whole),
            )

    def _offer(self, new: Candidate) -> None:
        """Keep a row, unless one of its identity and a lower rank is there."""
        old = self._one(
            "SELECT rank, source, name, place FROM candidates WHERE identity = ?", new.identity
        )
        if old is not None:
            wins = new.rank < old[0]
            loser = old[1:] if wins else (new.source, new.name, new.place)
            self._count("duplicate", *loser[:2])
            self._sample("duplicate", loser[0], new.lot, loser[2], loser[1], "", "")
            if not wins:
                return
        self._db.execute(
            "INSERT OR REPLACE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(new.identity, new.rank, new.lot, new.source, new.name),
                *(new.shard, new.row, new.place),
            ),
        )

    def _drop(self, drop: Drop) -> None:
        self._count(drop.rule, drop.source, drop.name)
        self._sample(
            *(drop.rule, drop.source, drop.lot, drop.place),
            *(drop.name, drop.question, drop.detail),
        )

    def _sample(self, *values: str | bytes) -> None:
        """A row of the table, in the order of its columns."""
        self._db.execute("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _count(self, rule: str, source: str, name: str) -> None:
        self._db.execute(
            "INSERT INTO drops VALUES (?, ?, ?, 1) ON CONFLICT (rule, source, name) DO UPDATE "
            "SET rows = rows + 1",
            (rule, source, name),
        )

    def _trim(self, rules: Iterable[str]) -> None:
        """Leave the samples of the lowest lots, which no order of rows can change."""
        for rule in rules:
            self._db.execute(
                "DELETE FROM samples WHERE rule = ?1 AND (source, lot, place) IN "
                "(SELECT source, lot, place FROM (SELECT source, lot, place, row_number() OVER "
                "(PARTITION BY source ORDER BY lot, place) AS turn FROM samples WHERE rule = ?1) "
                "WHERE turn > ?2)",
                (rule, SAMPLES),
            )

    # ---- what is chosen --------------------------------------------------------------------------

    def choose(self, caps: dict[tuple[str, str], int]) -> None:
        """Leave of each sub-dataset the rows of the lowest lots, as many as its cap."""
        with _transaction(self._db):
            self._db.execute("CREATE TEMP TABLE caps (source TEXT, name TEXT, most INTEGER)")
            self._db.executemany(
                "INSERT INTO caps VALUES (?, ?, ?)", [(*key, most) for key, most in caps.items()]
            )
            self._db.execute(
                "INSERT INTO chosen SELECT identity, lot, source, name, shard, row, NULL FROM "
                "(SELECT *, row_number() OVER (PARTITION BY source, name ORDER BY lot) AS turn "
                "FROM candidates LEFT JOIN caps USING (source, name)) "
                "WHERE most IS NULL OR turn <= most"
            )
            self._db.execute(
                f"INSERT INTO drops SELECT 'cap', source, name, count(*) {_CAPPED} "
                "GROUP BY source, name"
            )
            self._db.execute(
                "INSERT INTO samples SELECT 'cap', source, lot, place, name, '', '' FROM "
                "(SELECT *, row_number() OVER (PARTITION BY source ORDER BY lot) AS turn "
                f"{_CAPPED}) WHERE turn <= ?",
                (SAMPLES,),
            )
            self.note("chosen", "yes")
        self._db.execute("DROP TABLE caps")

    def unwritten(self, shard: int) -> Iterator[Chosen]:
        """The chosen rows of a file that have no text yet, in its order."""
        last = 0
        while page := self._all(
            "SELECT identity, row FROM chosen WHERE shard = ? AND row > ? AND text IS NULL "
            "ORDER BY row LIMIT ?",
            *(shard, last, PAGE),
        ):
            yield from (Chosen(identity=identity, row=row) for identity, row in page)
            last = page[-1][1]

    def write(self, texts: Sequence[tuple[bytes, bytes]]) -> None:
        """(identity, line of the corpus) of a batch of rows, all or nothing."""
        with _transaction(self._db):
            self._db.executemany("UPDATE chosen SET text = ?2 WHERE identity = ?1", texts)

    def lines(self) -> Iterator[bytes]:
        """The rows of the corpus in the order of their lots."""
        with closing(self._db.execute("SELECT text FROM chosen ORDER BY lot")) as cursor:
            yield from (text for (text,) in cursor)

    # ---- what came of it -------------------------------------------------------------------------

    def names(self, source: str) -> frozenset[str]:
        """Sub-datasets of which a source has a row that a tier lists."""
        return frozenset(
            name for (name,) in self._all("SELECT name FROM names WHERE source = ?", source)
        )

    def rows(self, shards: Iterable[int]) -> int:
        """Rows of these files that were looked at."""
        counts = dict(self._all("SELECT shard, rows FROM shards"))
        return sum(counts.get(shard, 0) for shard in shards)

    def kept(self) -> list[tuple[str, str, int]]:
        """(source, canonical name, rows) of the corpus."""
        return self._all(
            "SELECT source, name, count(*) FROM chosen GROUP BY source, name ORDER BY source, name"
        )

    def candidates(self, source: str) -> int:
        found = self._one("SELECT count(*) FROM candidates WHERE source = ?", source)
        return int(found[0]) if found else 0

    def drops(self) -> list[tuple[str, str, str, int]]:
        """(rule, source, name, rows), in the order of the rules."""
        order = list(RULES)
        found = self._all("SELECT * FROM drops ORDER BY source, name")
        return sorted(found, key=lambda drop: order.index(drop[0]))

    def samples(self, rule: str, source: str) -> list[tuple[str, str, str, str]]:
        """(place, name, question, detail) of some rows of a source that a rule dropped."""
        return self._all(
            "SELECT place, name, question, detail FROM samples WHERE rule = ? AND source = ? "
            "ORDER BY lot, place",
            *(rule, source),
        )

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
        return found

    def _all(self, query: str, *values: Any) -> list[Any]:
        return self._db.execute(query, values).fetchall()


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """BEGIN … COMMIT, or ROLLBACK if the block raises, by Ctrl-C too."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
