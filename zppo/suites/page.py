"""The page and the JSON file of a suite, in the layout of the paper's Tables 1 and 2: a table for
each family, models down, benchmarks across, the average at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

from zppo.errors import UserError, nearest
from zppo.records.atomic_file import written_whole
from zppo.report.frame import ASSETS, digest, environment
from zppo.suites.order import SuiteOrder
from zppo.suites.plan import told
from zppo.suites.results import (
    Average,
    Column,
    Difference,
    average,
    difference,
    family_difference,
    folder_name,
    read_column,
)
from zppo.suites.table import OWN_JUDGE, Row

STYLE = ".wide { overflow-x: auto; } .wide th { white-space: nowrap; }"
"""Besides the report's: a table of 16 benchmarks is wider than a page."""
LABELS = "models.json"
"""The models of the folder, in the order in which they came."""
DATA, PAGE = "suite.json", "suite.html"
LOCK = "lock"
MAX_NAME = 200
"""Bytes of a folder's name; file systems take 255."""


def write_page(order: SuiteOrder) -> list[Path]:
    """Write `suite.json` and `suite.html` from all models of the folder. Raises UserError."""
    out, suite = Path(order.out), order.suite
    labels = add_labels(out, [model.label for model in order.models])
    columns = [read_column(out, label, suite) for label in labels]
    baseline = _baseline(columns, order.baseline)
    files = {
        DATA: msgspec.json.format(msgspec.json.encode(_data(order, columns, baseline))),
        PAGE: render_page(order, columns, baseline).encode(),
    }
    for name, content in files.items():
        with written_whole(out / name) as file:
            file.write(content)
    return [out / name for name in files]


def add_labels(out: Path, labels: Sequence[str]) -> list[str]:
    """All models that the folder has seen, these included. Raises UserError."""
    known = known_labels(out)
    every = list(dict.fromkeys([*known, *labels]))
    check_labels(every)
    if every != known:
        with written_whole(out / LABELS) as file:
            file.write(msgspec.json.encode(every))
    return every


def known_labels(out: Path) -> list[str]:
    """All models that the folder has seen. Raises UserError."""
    path = out / LABELS
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str]) if path.is_file() else []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        raise UserError(f"--out: {str(path)!r} is no list of models; remove it") from None


def check_labels(labels: Sequence[str]) -> None:
    """Each model has a folder of its own. Raises UserError."""
    seen: dict[str, str] = {}
    for label in labels:
        name = folder_name(label)
        if name in (DATA, PAGE, LABELS, LOCK) or len(name.encode()) > MAX_NAME:
            raise UserError(
                f"--label: {label[:80]!r} cannot be the name of a folder in --out; expected "
                f"another, of at most {MAX_NAME} bytes"
            )
        if name in seen:
            twice = "are called" if seen[name] == label else f"share a folder, {seen[name]!r} and"
            raise UserError(f"--label: two models {twice} {label!r}; name them apart")
        seen[name] = label


def _baseline(columns: Sequence[Column], label: str | None) -> Column:
    """The model that the others are compared with: the one named, else the first. Raises
    UserError."""
    labels = [column.label for column in columns]
    if label is not None and label not in labels:
        raise UserError(f"--baseline: there is no model {label!r}{nearest(label, labels)}")
    return columns[labels.index(label) if label is not None else 0]


# ---- as data -------------------------------------------------------------------------------------


def _data(order: SuiteOrder, columns: Sequence[Column], baseline: Column) -> dict[str, Any]:
    rows = order.suite.rows
    return {
        "suite": order.suite.name,
        "baseline": baseline.label,
        "judge": order.judge.model if order.judge is not None else None,
        "limit": order.limit,
        "decoding": order.suite.decoding,
        "models": [_model(rows, column, baseline) for column in columns],
    }


def _model(rows: Sequence[Row], column: Column, baseline: Column) -> dict[str, Any]:
    others = (
        {}
        if column is baseline
        else {
            short: difference(result, baseline.results[short])
            for short, result in column.results.items()
            if short in baseline.results
        }
    )
    families = list(dict.fromkeys(row.family for row in rows))
    return {
        "label": column.label,
        "averages": {family: average(family, rows, column) for family in families},
        "average_differences": {} if column is baseline else {
            family: family_difference(family, rows, column, baseline) for family in families
        },
        "benchmarks": {
            short: {"score": one.estimate, "questions": len(one.scores), "judged": one.judged,
                    "cut_off": one.cut_off, "unboxed": one.unboxed, "refused": one.refused,
                    "tokens": one.tokens, "harness": one.harness}
            for short, one in column.results.items()
        },
        "differences": others,
        "missing": column.missing,
    }  # fmt: skip


# ---- as a page -----------------------------------------------------------------------------------


def render_page(order: SuiteOrder, columns: Sequence[Column], baseline: Column) -> str:
    """The page as text; it fetches nothing."""
    style = (ASSETS / "page.css").read_text("utf-8") + STYLE
    rows = order.suite.rows
    families = [(name, list(group)) for name, group in groupby(
        sorted(rows, key=lambda row: _place(rows, row)), key=lambda row: row.family)]  # fmt: skip
    return (
        environment(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            title=order.suite.name,
            families=[(name, _table(name, group, columns, baseline)) for name, group in families],
            missing=_missing(columns),
            own_judges=[row.short for row in rows if row.scoring == OWN_JUDGE],
            benchmarks=[_about(row, columns) for row in rows],
            decoding=msgspec.to_builtins(order.suite.decoding),
            judge=order.judge.model if order.judge is not None else None,
            limit=order.limit,
            baseline=baseline.label,
            compared=len(columns) > 1,
            style=Markup(style),
            style_digest=digest(style),
        )
    )


def _place(rows: Sequence[Row], row: Row) -> int:
    """Where the family of a row comes first."""
    return next(i for i, other in enumerate(rows) if other.family == row.family)


def _table(
    family: str, rows: Sequence[Row], columns: Sequence[Column], baseline: Column
) -> dict[str, Any]:
    """A table of the paper: models down, benchmarks across, the average at the end."""
    scores = [
        [column.label, *(_score(column, row.short) for row in rows),
         _average(average(family, rows, column))]
        for column in columns
    ]  # fmt: skip
    differences = [
        [column.label, *(_difference(column, baseline, row.short) for row in rows),
         _signed(family_difference(family, rows, column, baseline), benchmarks=True)]
        for column in columns
        if column is not baseline
    ]  # fmt: skip
    header = ["", *(row.short for row in rows), "average"]
    return {"header": header, "scores": scores, "differences": differences}


def _score(column: Column, short: str) -> str:
    result = column.results.get(short)
    if result is None:
        return "–"
    share = result.estimate
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _average(one: Average) -> str:
    count = f"{one.have} of {one.of}"
    if one.value is None or one.low is None or one.high is None:
        return f"– ({count})"
    span = f"{100 * one.value:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"{span} ({count}{': without ' + ', '.join(one.missing) if one.missing else ''})"


def _difference(column: Column, baseline: Column, short: str) -> str:
    if short not in column.results or short not in baseline.results:
        return "–"
    return _signed(difference(column.results[short], baseline.results[short]))


def _signed(one: Difference | None, *, benchmarks: bool = False) -> str:
    if one is None:
        return "–"
    over = f" over {one.benchmarks}" if benchmarks else ""
    return f"{100 * one.value:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]{over}"


def _missing(columns: Sequence[Column]) -> list[tuple[str, str, str]]:
    """(benchmark, reason, models) of all that has no result, models of one reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        for short, reason in column.missing.items():
            found.setdefault((short, reason), []).append(column.label)
    return [(short, reason, ", ".join(labels)) for (short, reason), labels in found.items()]


def _about(row: Row, columns: Sequence[Column]) -> list[str]:
    """A benchmark's line in the table of what was run."""
    runs = [f"{one.label}: {told(one.results[row.short])}" for one in columns
            if row.short in one.results]  # fmt: skip
    rule = {"E+J": row.grader, "R+J": row.metric}.get(row.scoring, row.metric)
    return [row.short, row.benchmark, row.scoring, rule, "; ".join([*runs, row.note]).strip("; ")]
