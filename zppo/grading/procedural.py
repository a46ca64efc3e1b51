"""Scorers of procedural tasks as graders: `reasoning_gym:TASK` (with the settings of the task,
where it has some).

The gold answer of such a question is its *entry*, the reference answer and what the scorer needs to
know, as JSON. The package gives partial credit for some near misses; here, as everywhere, only a
full score earns the reward. A few of its scorers hand the answer to Python's compiler. The
invariant: such an answer passes `GUARDS` first, which let nothing through that could call or reach
anything but arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from zppo.grading.boxes import tidy
from zppo.grading.reasoning_gym_tasks import build_task, parse_specification, quiet

MAX_ANSWER = 20_000
"""Characters of an answer that is still scored."""
_NAMES = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi|[A-Za-z]"
_ARITHMETIC = re.compile(r"[0-9+\-*/(). ]*")
_FORMULA = re.compile(rf"(?:(?<![A-Za-z.])(?:{_NAMES})(?![A-Za-z])|[0-9+\-*/^(). ])*")
GUARDS: dict[str, re.Pattern[str]] = {
    "binary_matrix": re.compile(r"[0-9\s]*"),
    "countdown": _ARITHMETIC,
    "intermediate_integration": _FORMULA,
    "n_queens": re.compile(r"[Q_\s]*"),
    "puzzle24": _ARITHMETIC,
    "simple_integration": _FORMULA,
    "spiral_matrix": re.compile(r"[0-9\s]*"),
    "string_insertion": re.compile(r"[A-Za-z]*"),
}
"""Task -> all that an answer may consist of. A correct answer always does."""


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """What a scorer needs of a question; `answer` is None where the task has no single reference
    answer."""

    answer: str | None
    metadata: Mapping[str, Any]


def gold_entry(entry: Mapping[str, Any]) -> str:
    """An entry of the package as a gold answer: JSON. Values that JSON has no name for become
    text."""
    answer = entry["answer"]
    kept = Entry(None if answer is None else str(answer), entry["metadata"])
    return msgspec.json.encode(msgspec.to_builtins(kept, enc_hook=_plain, str_keys=True)).decode()


def reference_answer(gold: str) -> str:
    """The gold answer for people: the reference answer of an entry."""
    answer = msgspec.json.decode(gold, type=Entry).answer
    return "any that fits" if answer is None else answer


def is_entry(gold: str) -> bool:
    """Whether a gold answer is an entry."""
    try:
        msgspec.json.decode(gold, type=Entry)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return False
    return True


def scorer(
    specification: str,
) -> tuple[Callable[[str, str], bool | None], Callable[[str, str], bool]]:
    """The quick and the full half of the grader `reasoning_gym:SPECIFICATION`; the task is built
    when it scores."""
    task = specification.partition("?")[0]

    def quick(answer: str, gold: str) -> bool | None:
        return None if any(_allowed(task, form) for form in _forms(answer)) else False

    def full(answer: str, gold: str) -> bool:
        entry = msgspec.to_builtins(msgspec.json.decode(gold, type=Entry))
        allowed = [form for form in _forms(answer) if _allowed(task, form)]
        return any(_score(specification, form, entry) for form in allowed)

    return quick, full


def _forms(answer: str) -> list[str]:
    """The answer as it stands in the box, and without typesetting."""
    return list(
        dict.fromkeys(
            form for form in (answer.strip(), tidy(answer)) if 0 < len(form) <= MAX_ANSWER
        )
    )


def _allowed(task: str, answer: str) -> bool:
    guard = GUARDS.get(task)
    return guard is None or guard.fullmatch(answer) is not None


def _score(specification: str, answer: str, entry: dict[str, Any]) -> bool:
    dataset = _task(specification)
    with quiet():
        try:
            return float(dataset.score_answer(answer, entry)) >= 1.0
        except Exception:  # a scorer that trips over an answer has not found it right
            return False


@lru_cache(maxsize=64)
def _task(specification: str) -> Any:
    where = f"reasoning_gym:{specification}"
    task, settings = parse_specification(specification, where)
    return build_task(task, settings, seed=0, size=1, where=where)


def _plain(value: object) -> object:
    """For values of NumPy, fractions, symbols and the like."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else str(value)
