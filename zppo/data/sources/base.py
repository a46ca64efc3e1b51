"""What a source of questions is to the corpus: numbered raw rows, and how to speak of them.

A source yields rows lazily, so that a large file is never in memory at once. It checks only that
rows can be read; what makes a row a question is decided in one place, `zppo.data.corpus`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msgspec import Struct

RawRow: TypeAlias = tuple[int, dict[str, Any] | str]
"""(1-based number, the row's columns or the reason why there are none)."""
Unit: TypeAlias = Literal["line", "row", "question"]
OWN_COLUMNS = {"id": "id", "question": "question", "answer": "answer", "images": "images"}


class Columns(Struct, frozen=True, kw_only=True):
    """Our field names -> the columns of the source; `chosen` are the fields that the user named a
    column for."""

    names: Mapping[str, str]
    chosen: frozenset[str]

    @property
    def required(self) -> dict[str, str]:
        """Fields that the source must have a column for."""
        return {
            field: name
            for field, name in self.names.items()
            if field in {"question", "answer"} | self.chosen
        }


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
    columns: Mapping[str, str]
    grader: str | None = None
    """The rule that scores its questions, if the source brings its own."""

    def place(self, number: int) -> str:
        """Where a row stands, for messages: `train.jsonl:3`, or `train.parquet, row 3`."""
        return (
            f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, {self.unit} {number}"
        )


def same_words(text: str) -> str:
    """What two questions are compared by: the text up to case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
