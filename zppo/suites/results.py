"""What came of the rows of a suite, model beside model: scores with intervals, averages by family
that name what they lack, and paired differences.

The unit of sampling is the question. Benchmarks are taken as given: the interval of a family's
average says how far it would move with other questions of the same benchmarks, not with other
benchmarks. A benchmark without a result is in no average; every average says of how many it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.errors import UserError
from zppo.records.atomic_file import written_whole
from zppo.suites.intervals import Interval, mean_of, paired, wilson
from zppo.suites.table import Row, Suite

RESULT, TROUBLE = "result.json", "trouble.json"
ROWS = "rows"


class RowResult(Struct, frozen=True, kw_only=True):
    """One benchmark of one model. `settings` is what must be the same for a result to be kept."""

    short: str
    settings: dict[str, Any]
    harness: str
    """With its version."""
    scores: dict[str, float]
    """Question -> score from 0 to 1."""
    judged: int
    """Answers that the judge decided."""
    unboxed: int
    """Answers without a box."""
    cut_off: int
    """Answers that ended at the limit of tokens."""
    refused: int
    """Questions that the server, or that of the judge, would not take; they count as wrong."""
    tokens: int | None
    """Of all answers; None where the server did not count them."""
    seconds: float
    """Of the attempt that finished the row."""
    asked: int
    """Answers of that attempt that the journal did not have."""

    @property
    def estimate(self) -> Interval:
        return wilson([*self.scores.values()])


class Trouble(Struct, frozen=True, kw_only=True):
    """Why a row has no result yet."""

    reason: str


class Column(Struct, frozen=True, kw_only=True):
    """One model: its results and, for the other rows, the reasons why there are none."""

    label: str
    results: dict[str, RowResult]
    missing: dict[str, str]


class Average(Struct, frozen=True, kw_only=True):
    """Mean over the benchmarks of a family that have a result."""

    family: str
    value: float | None
    low: float | None
    high: float | None
    have: int
    of: int
    missing: list[str]


class Difference(Struct, frozen=True, kw_only=True):
    """Mean of paired differences to the baseline, with its 95 % interval."""

    value: float
    low: float
    high: float
    questions: int
    benchmarks: int = 1


def average(family: str, rows: Sequence[Row], column: Column) -> Average:
    """The average of a family's benchmarks."""
    shorts = [row.short for row in rows if row.family == family]
    have = [short for short in shorts if short in column.results]
    found = mean_of([column.results[short].estimate for short in have]) if have else None
    return Average(
        family=family,
        value=None if found is None else found.value,
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        have=len(have),
        of=len(shorts),
        missing=[short for short in shorts if short not in have],
    )


def difference(one: RowResult, baseline: RowResult) -> Difference | None:
    """Over the questions that both were asked; None if there is none."""
    values = _differences(one, baseline)
    if not values:
        return None
    found = paired([values])
    return Difference(value=found.value, low=found.low, high=found.high, questions=len(values))


def family_difference(
    family: str, rows: Sequence[Row], one: Column, baseline: Column
) -> Difference | None:
    """Over the benchmarks for which both have a result; None if there is none."""
    both = [
        values
        for row in rows
        if row.family == family and row.short in one.results and row.short in baseline.results
        if (values := _differences(one.results[row.short], baseline.results[row.short]))
    ]
    if not both:
        return None
    found = paired(both)
    return Difference(
        value=found.value,
        low=found.low,
        high=found.high,
        questions=sum(map(len, both)),
        benchmarks=len(both),
    )


def _differences(one: RowResult, baseline: RowResult) -> list[float]:
    return [one.scores[id] - baseline.scores[id] for id in baseline.scores if id in one.scores]


# ---- on disk -------------------------------------------------------------------------------------


def row_folder(out: Path, label: str, short: str) -> Path:
    return out / folder_name(label) / ROWS / short


def folder_name(label: str) -> str:
    """A label as the name of a folder; two labels may have one."""
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in label).lstrip(".") or "_"


def write_result(folder: Path, result: RowResult | Trouble) -> None:
    """Write a row's result, or why there is none; a result takes the trouble's place."""
    name = RESULT if isinstance(result, RowResult) else TROUBLE
    with written_whole(folder / name, synced=True) as file:
        file.write(msgspec.json.format(msgspec.json.encode(result), indent=1))
    if name == RESULT:
        (folder / TROUBLE).unlink(missing_ok=True)


def read_result(folder: Path) -> RowResult | None:
    """The result of a row, if it has one. Raises UserError for a file that is none."""
    try:
        return msgspec.json.decode((folder / RESULT).read_bytes(), type=RowResult)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(
            f"--out: {str(folder / RESULT)!r} is no result of this version ({error}); remove it"
        ) from None


def read_column(out: Path, label: str, suite: Suite) -> Column:
    """What there is of a model."""
    results: dict[str, RowResult] = {}
    missing: dict[str, str] = {}
    for row in suite.rows:
        folder = row_folder(out, label, row.short)
        result = read_result(folder)
        if result is not None:
            results[row.short] = result
        else:
            missing[row.short] = _trouble(folder)
    return Column(label=label, results=results, missing=missing)


def _trouble(folder: Path) -> str:
    try:
        return msgspec.json.decode((folder / TROUBLE).read_bytes(), type=Trouble).reason
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return "not run yet"
