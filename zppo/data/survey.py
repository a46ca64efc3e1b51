"""What a source of questions holds, counted before anything is trained on it: rows, lengths, kinds
of gold answers, rows that cannot be used, and questions that are held out too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from zppo.config.topology import REASONING_GYM
from zppo.data.corpus import BadRow, Corpus, held_out_overlap
from zppo.data.question import Question
from zppo.data.unshown import unshown_texts
from zppo.errors import count_of, printable
from zppo.grading.boxes import tidy
from zppo.grading.graders import choice_letters, shown_gold
from zppo.grading.maths import gold_content
from zppo.grading.numbers import as_number

MAX_LISTED = 20
"""Bad rows and held-out questions that the text names; JSON has all of them."""


class Lengths(Struct, frozen=True, kw_only=True):
    """Of the plain prompts in tokens of a model, or of the questions in characters without one."""

    unit: str
    least: int
    median: int
    nine_of_ten: int
    most: int
    limit: int | None
    """The longest that a run takes; None where no model tells."""
    above: int


class Shown(Struct, frozen=True, kw_only=True):
    """A question as the model sees it."""

    id: str
    gold: str
    prompt: str


class Survey(Struct, frozen=True, kw_only=True):
    source: str
    layout: str
    rows: int
    questions: int
    repeated: int
    bad_rows: list[BadRow]
    unit: str
    max_bad_rows: int
    conversations: int
    """Questions with earlier turns of user and assistant."""
    system_messages: int
    """Questions that bring a system message."""
    pictures: int
    placed: int
    """Questions whose pictures and videos have places in the turns."""
    unshown: dict[str, int]
    """Column -> how many questions are asked without the pictures or videos that it holds."""
    graders: dict[str, int]
    gold_answers: dict[str, int]
    worked_solutions: int
    """Gold answers that stand in a box or behind `####`."""
    lengths: Lengths
    held_out: int | None
    """Questions of the held-out source; None without one."""
    held_out_unshown: dict[str, int]
    """As `unshown`, of the held-out source."""
    overlap: list[str]
    shown: list[Shown]

    @property
    def usable(self) -> bool:
        """Whether a run could start on it."""
        few = len(self.bad_rows) <= self.max_bad_rows
        return few and not self.overlap and not self.lengths.above


def survey(
    source: str,
    corpus: Corpus,
    heldout: Corpus | None,
    *,
    measured: Lengths,
    shown: list[Shown],
    max_bad_rows: int,
) -> Survey:
    """Count; what takes a model or templates, `measured` and `shown`, is given."""
    questions = corpus.questions
    golds = [shown_gold(one.answer, one.grader) for one in questions]
    return Survey(
        source=source,
        layout=corpus.columns.layout.name,
        rows=len(questions) + len(corpus.bad_rows),
        questions=len(questions),
        repeated=sum(row.repeats for row in corpus.bad_rows),
        bad_rows=corpus.bad_rows,
        unit=corpus.unit,
        max_bad_rows=max_bad_rows,
        conversations=sum(len(one.earlier) > one.has_system for one in questions),
        system_messages=sum(one.has_system for one in questions),
        pictures=sum(bool(one.media) for one in questions),
        placed=sum(one.has_places for one in questions),
        unshown=corpus.count_unshown(),
        graders=_counted(one.grader for one in questions),
        gold_answers=_counted(
            "of the task's own rule" if _has_own_rule(one) else kind_of_gold(gold)
            for one, gold in zip(questions, golds, strict=True)
        ),
        worked_solutions=sum(gold_content(gold) != gold for gold in golds),
        lengths=measured,
        held_out=None if heldout is None else len(heldout.questions),
        held_out_unshown={} if heldout is None else heldout.count_unshown(),
        overlap=held_out_overlap(questions, [] if heldout is None else heldout.questions),
        shown=shown,
    )


def lengths_of(unit: str, lengths: Sequence[int], limit: int | None) -> Lengths:
    """Order statistics of at least one length; `nine_of_ten` are no longer than it says."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return Lengths(
        unit=unit,
        least=ordered[0],
        median=ordered[last // 2],
        nine_of_ten=ordered[-(-9 * len(ordered) // 10) - 1],
        most=ordered[last],
        limit=limit,
        above=sum(length > limit for length in ordered) if limit is not None else 0,
    )


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions from all over the source, in its order."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def kind_of_gold(gold: str) -> str:
    """What sort of answer it is, for people."""
    content = gold_content(gold)
    text = tidy(content)
    number = as_number(text)
    if not text:
        return "none"
    if number is not None:
        return "whole number" if number.denominator == 1 else "other number"
    if choice_letters(content):
        return "choice"
    if all(character.isalpha() or character in " '’-.,!?" for character in text):
        return "words"
    return "mathematics or other text"


def _has_own_rule(question: Question) -> bool:
    return question.grader.startswith(f"{REASONING_GYM}:")


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


# ---- for people ----------------------------------------------------------------------------------


def survey_text(found: Survey) -> str:
    """The rows that were asked for, then what was counted, so that a terminal ends with it."""
    return "".join(f"{line}\n" for line in [*_shown_lines(found), *_count_lines(found)])


def _shown_lines(found: Survey) -> Iterator[str]:
    for one in found.shown:
        yield f"── {printable(one.id)} · gold answer: {printable(' '.join(one.gold.split())[-80:])}"
        yield printable(one.prompt)
        yield ""


def _count_lines(found: Survey) -> Iterator[str]:
    rows = count_of(found.rows, found.unit)
    yield f"{found.source}: {count_of(found.questions, 'question')} in {rows} of data"
    yield _line("layout", found.layout)
    if found.conversations or found.system_messages:
        yield _line(
            "conversations",
            f"{found.conversations} with earlier turns, {found.system_messages} with a system "
            "message",
        )
    if found.pictures:
        where = f", {found.placed} of them at places in the words" if found.placed else ""
        yield _line(
            "pictures", f"{count_of(found.pictures, 'question has', 'questions have')} some{where}"
        )
    for text in unshown_texts(found.unshown):
        yield _line("not shown", printable(text))
    yield _line("graders", _listed(found.graders))
    yield _line("gold answers", _listed(found.gold_answers))
    if found.worked_solutions:
        yield _line("", f"{found.worked_solutions} in a box or behind ####, of worked solutions")
    yield from _length_lines(found.lengths)
    yield _line("repeated", f"{found.repeated}")
    yield _line("bad rows", f"{len(found.bad_rows)}, data.max_bad_rows allows {found.max_bad_rows}")
    yield from _some([f"{found.unit} {row.line}: {row.reason}" for row in found.bad_rows])
    if found.held_out is not None:
        yield _line(
            "held out",
            f"{count_of(found.held_out, 'question')}, {len(found.overlap)} of them here as well",
        )
        yield from _some(found.overlap)
        for text in unshown_texts(found.held_out_unshown):
            yield _line("", printable(text))


def _length_lines(lengths: Lengths) -> Iterator[str]:
    what = "prompts" if lengths.unit == "tokens" else "questions"
    yield _line(
        what,
        f"{lengths.least} to {lengths.most} {lengths.unit}, median {lengths.median}, nine of "
        f"ten at most {lengths.nine_of_ten}",
    )
    if lengths.above:
        yield _line("", f"{lengths.above} are longer than {lengths.limit}, data.max_prompt_tokens")


def _line(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {printable(name)}" for name, count in counts.items())


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (_line("", printable(line)) for line in lines[:MAX_LISTED])
    if len(lines) > MAX_LISTED:
        yield _line("", f"… and {len(lines) - MAX_LISTED} more")
