"""What a source of questions is to the corpus: numbered raw rows, and how to speak of them.

A source yields rows lazily, so that a large file is never in memory at once. It checks only that
rows can be read; what makes a row a question is decided in one place, `zppo.data.rows`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from zppo.data.sources.layouts import Columns, Wanted, settle

RawRow: TypeAlias = tuple[int, dict[str, Any] | str]
"""(1-based number, the row's columns or the reason why there are none)."""
Unit: TypeAlias = Literal["line", "row", "question"]


class Source(Struct, frozen=True, kw_only=True):
    """One opened source. `rows` may be iterated once; it raises UserError where the source is
    damaged."""

    name: str
    """How messages call it: a path, or the specification of a procedural source."""
    stem: str
    """Ids that are made from the content begin with it."""
    folder: Path
    """Relative paths of pictures start here."""
    unit: Unit
    rows: Iterator[RawRow]
    columns: Columns
    grader: str | None = None
    """The rule that scores its questions, if the source brings its own."""
    pictured: Mapping[str, Any] = {}
    """A row that stands for the columns of pictures of a table that are not read, and should be."""
    named_by_content: bool = False
    """Whether the name of each picture's file is the SHA-256 of what is in it."""

    def place(self, number: int) -> str:
        """Where a row stands, for messages: `train.jsonl:3`, or `train.parquet, row 3`."""
        return (
            f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, {self.unit} {number}"
        )


def by_first_row(rows: Iterator[RawRow], wanted: Wanted) -> tuple[Columns, Iterator[RawRow]]:
    """The columns that the first readable row has, and all rows, that one included."""
    passed: list[RawRow] = []
    present: list[str] = []
    for number, row in rows:
        passed.append((number, row))
        if isinstance(row, dict):
            present = list(row)
            break
    return settle(wanted, present), chain(passed, rows)


def same_words(text: str) -> str:
    """What two questions are compared by: the text up to case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
