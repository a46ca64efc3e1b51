"""The corpus: rows of a source in, checked `Question`s out, and the order in which an epoch visits
them.

The invariant: a question that enters the corpus can be trained on: it has a text, a gold answer, an
id of its own and readable pictures. A row that cannot is a *bad row*: counted, listed with its
number, and refused above `data.max_bad_rows`. Where rows come from, files, folders or procedures,
is the business of `zppo.data.sources`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from zppo.config.topology import DataConfig
from zppo.data.pictures import picture_problem
from zppo.data.question import Question
from zppo.data.sources import OWN_COLUMNS, Columns, Source, open_source
from zppo.data.sources.base import Unit, same_words
from zppo.data.sources.jsonl import kind_of
from zppo.errors import UserError, nearest
from zppo.grading import get_grader
from zppo.grading.maths import gold_answer
from zppo_protocol.values import MediaReference

MAX_TEXT = 1_000_000
"""Characters of one question or answer; far above any real one, and below what a message may
carry."""
MAX_ID = 200
"""Characters of an id: group ids are built from it and must fit a protocol name."""
MAX_PATH = 512
_PROSE = re.compile(r"[^\W\d_]+(?:[ '’-]+[^\W\d_]+){2,}[.!?]?")
"""Three words or more, and nothing else; names and single words are good gold answers."""


class BadRow(Struct, frozen=True, kw_only=True):
    """A row that was left out: its 1-based number (JSONL: its line) and one reason."""

    line: int
    reason: str


class Corpus(Struct, frozen=True, kw_only=True):
    """Questions in the order of the source, and the rows that did not make it, numbered in
    `unit`s."""

    questions: list[Question]
    bad_rows: list[BadRow]
    unit: Unit = "line"


class RowError(ValueError):
    """Why one row is bad; becomes a `BadRow`."""


def load_questions(path: str, config: DataConfig, base: Path) -> Corpus:
    """Read and check a question file, a data set folder, or a procedural source (docs/data.md).

    `path` is relative to `base` (the topology's folder); picture paths are relative to the question
    file's own folder. Raises UserError when the source is missing, damaged, of an unknown kind or
    without a good row, when the grader is unknown, and when more than `config.max_bad_rows` rows
    are bad.
    """
    columns = Columns(names=OWN_COLUMNS | dict(config.fields), chosen=frozenset(config.fields))
    builder = _CorpusBuilder(open_source(path, columns, base), config)
    for number, row in builder.source.rows:
        builder.add(number, row)
    return builder.finish()


class _CorpusBuilder:
    """Collects good and bad rows, and remembers where each id and each question was seen first."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.source = source
        self.config = config
        self.columns = source.columns
        get_grader(config.grader)
        self.grader_name = source.grader or config.grader
        self.grader = get_grader(self.grader_name)
        self.questions: list[Question] = []
        self.bad_rows: list[BadRow] = []
        self.line_of_id: dict[str, int] = {}
        self.line_of_text: dict[tuple[object, ...], int] = {}

    def add(self, line: int, row: dict[str, Any] | str) -> None:
        try:
            if isinstance(row, str):
                raise RowError(row)
            question = self._question(row)
            self._claim(question, line)
        except RowError as error:
            self.bad_rows.append(BadRow(line=line, reason=str(error)))
        else:
            self.questions.append(question)

    def finish(self) -> Corpus:
        self._refuse_too_many()
        if not self.questions:
            raise UserError(f"{self.source.name}: holds no question; expected at least one row")
        return Corpus(questions=self.questions, bad_rows=self.bad_rows, unit=self.source.unit)

    def _refuse_too_many(self) -> None:
        count, limit = len(self.bad_rows), self.config.max_bad_rows
        if count > limit:
            first = self.bad_rows[0]
            rows = "1 bad row" if count == 1 else f"{count} bad rows"
            raise UserError(
                f"{self.source.place(first.line)}: {first.reason}; {rows} where data.max_bad_rows "
                f"allows {limit}: mend the file or raise the limit"
            )

    def _question(self, row: dict[str, Any]) -> Question:
        text = self._text(row, "question")
        answer = self._text(row, "answer")
        media = tuple(self._media(row))
        if not self.grader.usable(answer):
            raise RowError(
                f"the gold answer is {answer[:40]!r}, which the grader {self.grader_name!r} can "
                "never meet"
            )
        return Question(
            id=self._id(row, text, media),
            text=text,
            answer=answer,
            media=media,
            grader=self.grader_name,
        )

    def _text(self, row: dict[str, Any], field: str) -> str:
        """Required text. Numbers are accepted and become their text; everything else is a bad
        row."""
        column = self.columns[field]
        name = {"question": "the question", "answer": "the gold answer"}[field]
        if row.get(column) is None:
            hint = nearest(column, row) if row and column not in row else ""
            raise RowError(f"{name} ({column!r}) is missing{hint}")
        text = _as_text(row[column], f"{name} ({column!r})").strip()
        if not text:
            raise RowError(f"{name} ({column!r}) is empty")
        if len(text) > MAX_TEXT:
            raise RowError(
                f"{name} ({column!r}) has {len(text)} characters; at most {MAX_TEXT} are taken"
            )
        return text

    def _id(self, row: dict[str, Any], text: str, media: tuple[MediaReference, ...]) -> str:
        """The row's own id, or one made from what is asked, so that moving rows about does not
        rename them."""
        column = self.columns["id"]
        if row.get(column) is None:
            content = "\0".join([text, *(m.path for m in media)])
            return f"{self.source.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        name = _as_text(row[column], f"the id ({column!r})")
        if not name.strip() or len(name) > MAX_ID or not name.isprintable():
            raise RowError(
                f"the id ({column!r}) is {name[:40]!r}; expected 1 to {MAX_ID} printable characters"
            )
        return name

    def _media(self, row: dict[str, Any]) -> Iterator[MediaReference]:
        column = self.columns["images"]
        value = row.get(column)
        paths = [value] if isinstance(value, str) else [] if value is None else value
        if isinstance(value, dict) and "bytes" in value:
            raise RowError(
                f"the images ({column!r}) lie inside the table; expected paths of picture files"
            )
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise RowError(
                f"the images ({column!r}) are a {kind_of(value)}; expected a path or a list of "
                "paths"
            )
        for path in paths:
            yield MediaReference(kind="image", path=self._picture(path))

    def _picture(self, path: str) -> str:
        full = (self.source.folder / _clean(path, "an image path")).absolute()
        if len(str(full)) > MAX_PATH:
            raise RowError(f"image path {path[:40]!r}… is longer than {MAX_PATH} characters")
        problem = picture_problem(full)
        if problem:
            raise RowError(f"image {path!r} {problem}")
        return str(full)

    def _claim(self, question: Question, line: int) -> None:
        earlier = self.line_of_id.get(question.id)
        same = self.line_of_text.get(_identity(question))
        if same is not None:
            raise RowError(f"asks the same as {self.source.unit} {same}")
        if earlier is not None:
            raise RowError(f"the id {question.id!r} was used on {self.source.unit} {earlier}")
        self.line_of_id[question.id] = line
        self.line_of_text[_identity(question)] = line


def _as_text(value: object, name: str) -> str:
    if isinstance(value, str):
        return _clean(value, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{name} is not a finite number")
        return str(value)
    raise RowError(f"{name} is a {kind_of(value)}; expected text or a number")


def _clean(value: str, name: str) -> str:
    """Refuse what JSON allows but no tokenizer or message can carry."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"{name} holds a NUL or half a surrogate pair")
    return value


def _identity(question: Question) -> tuple[object, ...]:
    """What makes two questions the same: the text up to case, width and white space, and the
    pictures."""
    return (same_words(question.text), *(media.path for media in question.media))


def held_out_overlap(train: Iterable[Question], heldout: Iterable[Question]) -> list[str]:
    """Ids of the training questions that are held out too: same normalised text and same
    pictures."""
    held = {_identity(question) for question in heldout}
    return [question.id for question in train if _identity(question) in held]


def gold_notes(where: str, questions: Iterable[Question]) -> list[str]:
    """What works but may surprise: gold answers of several words, which the grader `math` can only
    compare as text. `where` is the setting of their source."""
    golds = [one for one in questions if one.grader == "math" and _is_prose(one.answer)]
    if not golds:
        return []
    count = "1 gold answer is" if len(golds) == 1 else f"{len(golds)} gold answers are"
    return [
        f"{where}: {count} words, not mathematics, first {golds[0].answer[:40]!r} of the question "
        f"{golds[0].id!r}: the grader 'math' has little but the same words to go by, see "
        "data.grader"
    ]


def _is_prose(gold: str) -> bool:
    return _PROSE.fullmatch(gold_answer(gold)) is not None


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(n), [n] int64.

    It sorts raw PCG64 output, whose stream NumPy guarantees for ever (NEP 19), so a resumed run and
    a later NumPy see the same order; `Generator.permutation` gives no such promise.
    """
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


def bad_rows_text(corpus: Corpus) -> str:
    """The body of `bad_rows.txt`: one `line N: reason` each (`row N` of a table)."""
    return "".join(f"{corpus.unit} {row.line}: {row.reason}\n" for row in corpus.bad_rows)
