"""The registry of graders: by what rule a final answer counts as right.

A grader compares the content of the last box with the gold answer. Its quick half cannot hang and
may say None, "I cannot tell"; its full half always decides but may need a time limit, which the
grader actor gives it. No box, no reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

from zppo.config.topology import JUDGE, REASONING_GYM
from zppo.errors import UserError, nearest
from zppo.grading.boxes import last_boxed, shown, tidy, unstyled
from zppo.grading.maths import full_maths, gold_answer, quick_maths
from zppo.grading.procedural import is_entry, reference_answer, scorer
from zppo_protocol.values import Grade

NO_BOX = "no boxed answer"


class Grader(Struct, frozen=True):
    """`quick` and `full` take (content of the last box, gold answer); `usable` tells a gold answer
    that can be met."""

    quick: Callable[[str, str], bool | None]
    full: Callable[[str, str], bool]
    usable: Callable[[str], bool]


def same_text(answer: str, gold: str) -> bool:
    """Grader `exact`: equal up to case, white space and typesetting."""
    return tidy(answer).casefold() == gold_answer(gold).casefold() != ""


_MARKS = re.compile(r"[{}\[\]*`]")
_OPENING = re.compile(
    r"(?:(?:the )?(?:correct |right |final |best )*(?:answer|option|choice)s?"
    r"(?: (?:is|are))?\s*:?\s*)+",
    re.IGNORECASE,
)
_JOINED = re.compile(r"\s*([(),;&/+])\s*")
_CHOICES = re.compile(
    r"\(?[A-Za-z]\)?(?:(?:[,;&/+ ]|,? ?and ?|(?<=\))(?=\())\(?[A-Za-z]\)?(?![a-zA-Z]))*",
    re.IGNORECASE,
)
_RUN = re.compile(r"[A-J]{2,}")
_LABELLED = re.compile(
    r"(?:(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*(?:[.:)]|,?\s*[-–—]+\s+|,\s*(?=because|since|as\b)))\s*"
    r"|([A-Z])\s+(?=[\d$(\\+−-]))(?!(?:or|and|nor)\b|[,;/&])\S.*",
    re.DOTALL,
)
_LETTER = re.compile(r"(?<![a-zA-Z])[A-Za-z](?![a-zA-Z])")


def choice_letters(answer: str) -> frozenset[str]:
    r"""The letters an answer to a multiple-choice question names, else none: `B`, `(b)`,
    `\textbf{(B)}\ 5`, `B. Paris`, `B - because ...`, `Option B`; several as a set: `A, C`,
    `(A)(C)`, `AC`."""
    text = tidy(answer)
    text = " ".join(_MARKS.sub(" ", unstyled(text)).split()).removesuffix(".").rstrip()
    text = _OPENING.sub("", text, count=1) if _OPENING.match(text) else text
    if _RUN.fullmatch(text) and list(text) == sorted(set(text)):
        return frozenset(text)
    if _CHOICES.fullmatch(_JOINED.sub(r"\1", text)):
        return frozenset(letter.upper() for letter in _LETTER.findall(text))
    labelled = _LABELLED.fullmatch(text)
    return frozenset(next(filter(None, labelled.groups())).upper()) if labelled else frozenset()


def names_choice(gold: str) -> bool:
    """Whether a gold answer names a letter; with one that does not, no response could ever be
    right."""
    return bool(choice_letters(gold_answer(gold)))


def has_text(gold: str) -> bool:
    """Whether anything is left of a gold answer once it is tidy."""
    return gold_answer(gold) != ""


def same_choice(answer: str, gold: str) -> bool:
    """Grader `choice`: the same letter, or the same set of letters."""
    letters = choice_letters(gold_answer(gold))
    return bool(letters) and choice_letters(answer) == letters


GRADERS: dict[str, Grader] = {
    "math": Grader(quick_maths, full_maths, has_text),
    "exact": Grader(same_text, same_text, has_text),
    "choice": Grader(same_choice, same_choice, names_choice),
    JUDGE: Grader(lambda answer, gold: same_text(answer, gold) or None, same_text, has_text),
}


def get_grader(name: str) -> Grader:
    """The grader of this name; `reasoning_gym:TASK` is the scorer of a task. Raises UserError with
    the nearest name."""
    family, colon, rest = name.partition(":")
    if family == REASONING_GYM and colon:
        return Grader(*scorer(rest), is_entry)
    if name not in GRADERS:
        raise UserError(f"data.grader: unknown grader {name!r}{nearest(name, GRADERS)}")
    return GRADERS[name]


def shown_gold(gold: str, grader: str) -> str:
    """The gold answer for people: as it is, but the reference answer alone of a procedural
    question."""
    return reference_answer(gold) if grader.startswith(f"{REASONING_GYM}:") else gold


def quick_grade(response: str, gold: str, grader: str) -> Grade | None:
    """Grade a response without risk of hanging, or None when only `grade` can decide."""
    content = last_boxed(response)
    if content is None:
        return Grade(reward=0.0, note=NO_BOX)
    verdict = get_grader(grader).quick(content, gold)
    return None if verdict is None else _graded(content, verdict)


def grade(response: str, gold: str, grader: str) -> Grade:
    """Grade a response in full: reward 1.0 or 0.0 and the parsed answer. May hang on hostile
    mathematics."""
    quick = quick_grade(response, gold, grader)
    if quick is not None:
        return quick
    content = last_boxed(response) or ""
    return _graded(content, get_grader(grader).full(content, gold))


def _graded(content: str, verdict: bool) -> Grade:
    return Grade(reward=float(verdict), answer=shown(content))
