"""Which columns hold what: our own names, those of layouts that are widely used, and those that
`data.fields` names, which win.

A column may be nested: `reward_model.ground_truth` is the field `ground_truth` of the column
`reward_model`, unless a column has that very name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from zppo.errors import UserError, nearest

OWN_COLUMNS = {name: name for name in ("id", "question", "answer", "images", "videos")}
ONE_IMAGE = "image"
"""Where data sets of the Hub have the picture, or the pictures, if they have no column `images`."""


class Layout(Struct, frozen=True):
    """Whose layout it is, and the columns by which it is known."""

    name: str
    question: str
    answer: str

    @property
    def columns(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}

    def __str__(self) -> str:
        return f"{self.name}'s ({self.question}, {self.answer})"


OWN = Layout("zppo", "question", "answer")
LAYOUTS = (
    OWN,
    Layout("verl", "prompt", "reward_model.ground_truth"),
    Layout("TRL", "prompt", "solution"),
    Layout("TRL", "prompt", "ground_truth"),
    Layout("TRL", "prompt", "answer"),
    Layout("MATH", "problem", "answer"),
    Layout("MATH", "problem", "solution"),
)
"""The first whose columns are all there is taken. GSM8K's columns are ours."""


class Wanted(Struct, frozen=True, kw_only=True):
    """What is asked of a source: `fields`, our names -> the columns that the user named; `every`,
    whether the other columns are wanted too; `optional`, the fields that a row need not have."""

    fields: Mapping[str, str] = {}
    every: bool = False
    optional: frozenset[str] = frozenset()


class Columns(Struct, frozen=True, kw_only=True):
    """Our field names -> the columns of the source; `chosen` are the fields that the user named a
    column for. The rest as in `Wanted`."""

    names: Mapping[str, str]
    chosen: frozenset[str]
    layout: Layout
    every: bool
    optional: frozenset[str]
    fits: bool
    """Whether what the columns were settled by has one for every field that is needed."""

    @property
    def required(self) -> dict[str, str]:
        """Fields that the source must have a column for."""
        return {
            field: name
            for field, name in self.names.items()
            if field in ({"question", "answer"} - self.optional) | self.chosen
        }

    @property
    def recognised(self) -> bool:
        """Whether other names than ours were taken without being asked for."""
        return any(
            self.names[field] != OWN_COLUMNS[field] and field not in self.chosen
            for field in {"question", "answer"} - self.optional
        )


def settle(wanted: Wanted, present: Collection[str]) -> Columns:
    """The columns of a source, or of a row, that has the columns `present`."""
    fits = [one for one in LAYOUTS if _fits(one, ("question", "answer"), wanted.fields, present)]
    # Without a gold answer nothing tells layouts of one question column apart: the last is plain.
    less = [one for one in LAYOUTS if _fits(one, ("question",), wanted.fields, present)][::-1]
    layout = next(iter([*fits, *less]), OWN)
    return Columns(
        names=OWN_COLUMNS
        | {"images": picture_column(present)}
        | layout.columns
        | dict(wanted.fields),
        chosen=frozenset(wanted.fields),
        layout=layout,
        every=wanted.every,
        optional=wanted.optional,
        fits=bool(fits),
    )


def picture_column(present: Collection[str]) -> str:
    """Where a source, or a row, that has the columns `present` has its pictures."""
    pictures = OWN_COLUMNS["images"]
    return ONE_IMAGE if pictures not in present and ONE_IMAGE in present else pictures


def _fits(
    layout: Layout, needed: Iterable[str], fields: Mapping[str, str], present: Collection[str]
) -> bool:
    columns = layout.columns
    return all(name in fields or top_level(columns[name], present) in present for name in needed)


def top_level(column: str, present: Collection[str]) -> str:
    """The column of the source in which a perhaps nested column lies."""
    return column if column in present else column.partition(".")[0]


def check_columns(where: object, columns: Columns, present: Collection[str]) -> None:
    """Raise UserError unless `present`, the columns of a table with nested ones by their paths,
    holds what the columns need."""
    for field, column in columns.required.items():
        if column not in present:
            raise UserError(
                f"{where}: there is no column {column!r} for "
                f"data.fields.{field}{nearest(column, present)}; name it in data.fields"
            )


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a perhaps nested column; None where the row lacks it."""
    if column in row:
        return row[column]
    node: Any = row
    for name in column.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def paths_of(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every column of a row, nested ones by their paths."""
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{name}.")
