"""The corpus: rows of a source in, checked `Question`s out, and the order in which an epoch visits
them.

The invariant: a question that enters the corpus can be trained on (`zppo.data.rows`), and has an id
and words of its own. A row that cannot is a *bad row*: counted, listed with its number, and refused
above `data.max_bad_rows`. Where rows come from, files, folders or procedures, is the business of
`zppo.data.sources`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from zppo.config.rewards import parts_of
from zppo.config.topology import DataConfig
from zppo.data.question import Question
from zppo.data.rows import RowReader
from zppo.data.sources import Source, open_source
from zppo.data.sources.base import Unit, same_words
from zppo.data.sources.layouts import Columns, Wanted
from zppo.data.text import RowError
from zppo.data.unshown import unshown_texts
from zppo.errors import UserError, count_of
from zppo.grading.maths import gold_answer
from zppo.grading.rewards import needs_gold, needs_row
from zppo_protocol.values import Media, PictureReference

_PROSE = re.compile(r"[^\W\d_]+(?:[ '’-]+[^\W\d_]+){2,}[.!?]?")
"""Three words or more, and nothing else; names and single words are good gold answers."""


class BadRow(Struct, frozen=True, kw_only=True):
    """A row that was left out: its 1-based number (JSONL: its line) and one reason."""

    line: int
    reason: str
    repeats: bool = False
    """Whether it is a good row that was there before."""


class Corpus(Struct, frozen=True, kw_only=True):
    """Questions in the order of the source, and the rows that did not make it, numbered in
    `unit`s."""

    questions: list[Question]
    bad_rows: list[BadRow]
    unit: Unit
    columns: Columns
    unshown: Mapping[str, str] = {}
    """Id of a question -> the column whose pictures or videos it is asked without."""

    def count_unshown(self) -> dict[str, int]:
        """Column -> how many of the questions are asked without what it holds."""
        ids = (one.id for one in self.questions)
        return dict(Counter(self.unshown[one] for one in ids if one in self.unshown))


def load_questions(path: str, config: DataConfig, base: Path, *, unpack: bool = False) -> Corpus:
    """Read and check a question file, a data set folder, or a procedural source (docs/data.md).

    `path` is relative to `base` (the topology's folder); picture paths are relative to
    `config.media_folder`, or else to the question file's own folder. `unpack`: write the pictures
    that lie inside a table into that folder (`zppo.data.media`), for whoever is to be shown them;
    else nothing is written. Raises UserError when the
    source is missing, damaged, of an unknown kind or without a good row, when the grader is
    unknown, and when more than `config.max_bad_rows` rows are bad.
    """
    parts = parts_of(config.reward)
    wanted = Wanted(
        fields=dict[str, str](config.fields.items()),
        every=needs_row(parts),
        optional=frozenset() if not parts or needs_gold(parts) else frozenset({"answer"}),
    )
    builder = _CorpusBuilder(open_source(path, wanted, base), config, unpack)
    for number, row in builder.source.rows:
        builder.add(number, row)
    return builder.finish()


class _Repeated(RowError):
    """The row asks what an earlier one asks."""


class _CorpusBuilder:
    """Collects good and bad rows, and remembers where each id and each question was seen first."""

    def __init__(self, source: Source, config: DataConfig, unpack: bool) -> None:
        self.source = source
        self.config = config
        self.reader = RowReader(source, config, unpack=unpack)
        self.questions: list[Question] = []
        self.bad_rows: list[BadRow] = []
        self.unshown = dict[str, str]()
        self.line_of_id: dict[str, int] = {}
        self.line_of_text: dict[tuple[object, ...], int] = {}

    def add(self, line: int, row: dict[str, Any] | str) -> None:
        try:
            if isinstance(row, str):
                raise RowError(row)
            question, unshown = self.reader.read(row)
            self._claim(question, line)
        except RowError as error:
            repeats = isinstance(error, _Repeated)
            self.bad_rows.append(BadRow(line=line, reason=str(error), repeats=repeats))
        else:
            self.questions.append(question)
            if unshown is not None:
                self.unshown[question.id] = unshown

    def finish(self) -> Corpus:
        self._refuse_too_many()
        if not self.questions:
            first = next(iter(self.bad_rows), None)
            why = "" if first is None else f", and {self.source.unit} {first.line}: {first.reason}"
            raise UserError(
                f"{self.source.name}: holds no question; expected at least one row{why}"
            )
        return Corpus(
            questions=self.questions,
            bad_rows=self.bad_rows,
            unit=self.source.unit,
            columns=self.source.columns,
            unshown=self.unshown,
        )

    def _refuse_too_many(self) -> None:
        count, limit = len(self.bad_rows), self.config.max_bad_rows
        if count > limit:
            first = self.bad_rows[0]
            rows = count_of(count, "bad row")
            raise UserError(
                f"{self.source.place(first.line)}: {first.reason}; {rows} where data.max_bad_rows "
                f"allows {limit}: mend the file or raise the limit"
            )

    def _claim(self, question: Question, line: int) -> None:
        earlier = self.line_of_id.get(question.id)
        identity = _identity(question)
        same = self.line_of_text.get(identity)
        if same is not None:
            raise _Repeated(f"asks the same as {self.source.unit} {same}")
        if earlier is not None:
            raise RowError(f"the id {question.id!r} was used on {self.source.unit} {earlier}")
        self.line_of_id[question.id] = line
        self.line_of_text[identity] = line


def _identity(question: Question) -> tuple[object, ...]:
    """What makes two rows the same: the turns up to case, width and white space, and the
    pictures."""
    system = question.earlier[0].content if question.has_system else ""
    return (same_words(system), *_asked(question))


def _asked(question: Question) -> tuple[object, ...]:
    """What is asked, whatever the system message says."""
    turns = [same_words(turn.content) for turn in question.earlier if turn.role != "system"]
    return (*turns, same_words(question.text), *map(_seen, question.media))


def _seen(media: Media) -> object:
    """What is in the files of a picture or video, and when it is shown."""
    if isinstance(media, PictureReference):
        return media.sha256
    return tuple(one.sha256 for one in media.frames), media.seconds


def held_out_overlap(train: Iterable[Question], heldout: Iterable[Question]) -> list[str]:
    """Ids of the training questions that are held out too: same normalised turns and same
    pictures, under whatever system message."""
    held = {_asked(question) for question in heldout}
    return [question.id for question in train if _asked(question) in held]


def source_notes(where: str, corpus: Corpus) -> list[str]:
    """That names were taken which nobody asked for, or pictures left. `where` is the setting of
    their source."""
    columns = corpus.columns
    left = [f"{where}: {one}" for one in unshown_texts(corpus.count_unshown())]
    if not columns.recognised:
        return left
    read = [field for field in ("question", "answer") if field not in columns.optional]
    names = ", ".join(f"{field}: {columns.names[field]}" for field in read)
    return [f"{where}: read as {columns.layout.name}'s ({names})", *left]


def gold_notes(where: str, questions: Iterable[Question]) -> list[str]:
    """What works but may surprise: gold answers of several words, which the grader `math` can only
    compare as text. `where` is the setting of their source."""
    golds = [one for one in questions if one.grader == "math" and _is_prose(one.answer)]
    if not golds:
        return []
    count = count_of(len(golds), "gold answer is", "gold answers are")
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
