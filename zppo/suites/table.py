"""The table of a suite: one row for each benchmark, in a YAML file.

`paper` is the table of the paper's 31 benchmarks (appendix B.2); `llm`, `vlm` and `video` are its
families. A user's own file has the same form (docs/suites.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field, structs

from zppo.config.base import Config, NonNegativeFloat, Positive, Share
from zppo.config.explain import explain
from zppo.config.strict_yaml import parse
from zppo.errors import UserError, nearest

PAPER = Path(__file__).parent / "paper.yaml"
FAMILIES = {"vlm": "VLM", "llm": "LLM", "video": "video"}
"""Suites that are a part of the paper's, and the family in its table."""
RULE_OR_JUDGE = "E+J"
PARSER_OR_JUDGE = "R+J"
METRIC = "Det"
OWN_JUDGE = "BJ"


class Decoding(Config, frozen=True, kw_only=True):
    """What every request says; the defaults are the paper's (appendix B.2)."""

    max_new_tokens: Positive = 12_288
    temperature: NonNegativeFloat = 0.6
    top_p: Share = 0.95
    top_k: Annotated[int, Meta(ge=0)] = 20
    """0 leaves it out"""
    min_p: Share = 0.0
    """0 leaves it out"""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 1.5
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=2.0)] = 1.0
    """1 leaves it out"""


class Source(Config, frozen=True, kw_only=True):
    """A data set of which lm-eval is told how to ask it, where it has no task of its own that asks
    for an answer in words."""

    path: str
    """data set on the hub, or `json` with `files`"""
    names: list[str] = field(default_factory=list)
    """its configurations, each a task of its own; none is the default one"""
    files: list[str] = field(default_factory=list)
    """local JSON Lines files, relative to the table"""
    question: str
    """a column, or Jinja over the columns of a row"""
    answer: str
    """likewise, the gold answer"""


class Row(Config, frozen=True, kw_only=True):
    """One benchmark. Either `task` names tasks of the harness, or `source` a data set."""

    short: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,40}$")]
    family: Annotated[str, Meta(min_length=1)]
    benchmark: str = ""
    """its full name"""
    harness: Literal["lm-eval", "lmms-eval"]
    task: list[str] = field(default_factory=list)
    source: Source | None = None
    split: str = "test"
    """of `source`; a task of the harness has its own, and this says which"""
    include: str | None = None
    """folder with definitions of tasks, relative to the table"""
    scoring: Literal["E+J", "R+J", "Det", "BJ"]
    """E+J: `grader`, then the judge; R+J: the harness's `metric`, then the judge; Det: the metric
    alone; BJ: the metric, which the harness gets from its own judge prompt"""
    grader: Literal["math", "exact", "choice"] = "math"
    metric: str = ""
    """where the score stands in a line of the harness's samples: `acc`, `acc.score`, or two places
    that must be equal, `acc.parsed = acc.answer`"""
    part: str | None = None
    """of the task's questions only those at which `PATH ~ REGEX` holds in a line of the samples"""
    directives: list[str] = field(default_factory=list)
    """regular expressions of the format directives in the benchmark's own prompt, which are taken
    out"""
    decoding: dict[str, Any] = field(default_factory=dict)
    """what differs from the table's"""
    questions: Positive | None = None
    """how many there are, for the plan"""
    data: str = ""
    """the data set, for the reader"""
    gated: bool = False
    """whether its terms must be accepted on the hub"""
    missing: str | None = None
    """why no harness has it"""
    note: str = ""


class Table(Config, frozen=True, kw_only=True):
    name: str = ""
    decoding: Decoding = Decoding()
    rows: Annotated[list[Row], Meta(min_length=1)]


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """Chosen rows of a table; `folder` is where the table lies."""

    name: str
    folder: str
    decoding: Decoding
    rows: list[Row]


def load_suite(name: str, only: list[str]) -> Suite:
    """The suite that the command line names, cut down to the benchmarks in `only`. Raises
    UserError."""
    family = FAMILIES.get(name)
    path = PAPER if name == "paper" or family is not None else Path(name)
    if path is not PAPER and not path.is_file():
        raise UserError(
            f"--suite is {name!r}; expected paper, llm, vlm, video or a YAML file"
            f"{nearest(name, ['paper', *FAMILIES])}"
        )
    table = read_table(path)
    rows = [row for row in table.rows if family in (None, row.family)]
    shorts = [row.short for row in rows]
    for short in only:
        if short not in shorts:
            raise UserError(
                f"--only: the suite {name!r} has no benchmark {short!r}{nearest(short, shorts)}"
            )
    chosen = [row for row in rows if not only or row.short in only]
    for row in chosen:
        _check_files(row, path.absolute().parent, f"{path}: {row.short}")
    return Suite(
        name=table.name or path.stem if family is None else name,
        folder=str(path.absolute().parent),
        decoding=table.decoding,
        rows=chosen,
    )


def read_table(path: Path) -> Table:
    """Read and check a table. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--suite: {str(path)!r} cannot be read as UTF-8 text") from None
    data = parse(text, str(path)).data
    try:
        table = msgspec.convert(data, Table)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {explain(str(error), data, Table).sentence}") from None
    seen: set[str] = set()
    for row in table.rows:
        _check_row(row, f"{path}: {row.short}", table.decoding)
        if row.short.casefold() in seen:  # each has a folder, also where names know no case
            raise UserError(f"{path}: {row.short} is given twice")
        seen.add(row.short.casefold())
    return table


def tasks_of(row: Row) -> list[str]:
    """Names of the tasks of a row."""
    if row.source is None:
        return row.task
    names = row.source.names or [""]
    # A task's name is a word of a list, and names files.
    return [re.sub(r"[^\w.-]", "_", f"zppo_{row.short}_{name}".rstrip("_")) for name in names]


def decoding_of(row: Row, suite: Suite) -> Decoding:
    """The decoding of a row: the table's, and what the row changes."""
    return structs.replace(suite.decoding, **row.decoding)


def _check_files(row: Row, folder: Path, where: str) -> None:
    """Raises UserError."""
    for file in row.source.files if row.source is not None else []:
        if not (folder / file).is_file():
            raise UserError(f"{where}: source.files has {file!r}; there is no file {folder / file}")
    if row.include is not None and not (folder / row.include).is_dir():
        raise UserError(
            f"{where}: include is {row.include!r}; there is no folder {folder / row.include}"
        )


def _check_row(row: Row, where: str, decoding: Decoding) -> None:
    both = {**msgspec.to_builtins(decoding), **row.decoding}
    try:
        msgspec.convert(both, Decoding)
    except msgspec.ValidationError as error:
        sentence = explain(str(error), both, Decoding, "decoding").sentence
        raise UserError(f"{where}: {sentence}") from None
    path, tilde, part = (row.part or "").partition("~")
    if row.part is not None and not (path.strip() and tilde):
        raise UserError(f"{where}: part is {row.part!r}; expected PATH ~ REGEX")
    for pattern in [*row.directives, part.strip()]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"{where}: {pattern[:80]!r} is no regular expression ({error})"
            ) from None
    if row.missing is not None:
        return
    if bool(row.task) == (row.source is not None):
        raise UserError(f"{where}: expected either task or source")
    if row.source is not None and row.harness != "lm-eval":
        raise UserError(f"{where}: a source needs harness: lm-eval; expected task")
    if row.source is not None and row.scoring != RULE_OR_JUDGE:
        raise UserError(f"{where}: scoring is {row.scoring}; expected E+J, because it has a source")
    tasks = tasks_of(row)
    if len(set(tasks)) < len(tasks) or not all(re.fullmatch(r"[^\s,]+", one) for one in tasks):
        raise UserError(
            f"{where}: the tasks are {', '.join(map(repr, tasks))}; expected names without spaces "
            "or commas, each once"
        )
    if row.scoring != RULE_OR_JUDGE and not row.metric.strip():
        raise UserError(f"{where}: metric is missing; {row.scoring} reads the harness's score")
