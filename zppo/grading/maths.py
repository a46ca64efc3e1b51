"""Mathematical equivalence of two answers (paper, section Reward).

The quick half decides by text and exact numbers and cannot hang. The full half asks math-verify,
which may run for ever on hostile input: call it where the process can be killed. Neither half ever
evaluates text as code: only math-verify's LaTeX grammar is used, not its expression parser, which
goes through Python's compiler.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from zppo.grading.boxes import last_boxed, tidy
from zppo.grading.numbers import as_number, same_number
from zppo.grading.units import contradict

MAX_MATHS = 1_000
"""Characters of an answer that is still read as mathematics; anything longer must be equal as
text."""
MAX_DEPTH = 30
"""Nested braces and brackets of such an answer."""

_SIGNS = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\\circ(?![a-zA-Z])|°|\\?%")
_MARKED = re.compile(r"^####[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ ,'’-]+[^\W\d_]+)*", re.UNICODE)


def gold_answer(gold: str) -> str:
    """The tidy gold answer; out of a worked solution, that in its last box or behind the `####` of
    its last line."""
    boxed, marked = last_boxed(gold), _MARKED.search(gold)
    return tidy(boxed or (marked[1] if marked else gold))


def without_signs(answer: str) -> str:
    """The answer without degree and percent signs."""
    return " ".join(_SIGNS.sub("", answer).split())


def quick_maths(answer: str, gold: str) -> bool | None:
    """Compare by text, words and exact numbers; None when only mathematics can decide. Never
    hangs."""
    answer, gold = tidy(answer), gold_answer(gold)
    if _same_text(answer, gold) or _same_text(without_signs(answer), without_signs(gold)):
        return True
    if not answer or not gold or too_hard(answer) or too_hard(gold):
        return False
    if (_WORDS.fullmatch(answer) and _WORDS.fullmatch(gold)) or contradict(answer, gold):
        return False
    return _quick_numbers(answer, gold)


def _same_text(answer: str, gold: str) -> bool:
    if _WORDS.fullmatch(gold):
        return answer.casefold() == gold.casefold()
    return answer != "" and answer.replace(" ", "") == gold.replace(" ", "")


def _quick_numbers(answer: str, gold: str) -> bool | None:
    x, y = as_number(without_signs(answer)), as_number(without_signs(gold))
    if x is None or y is None:
        return None
    if same_number(x, y):
        return True
    # 50 % against 0.5 is for the full comparison; without signs two different numbers are simply
    # different.
    return None if _SIGNS.search(answer) or _SIGNS.search(gold) else False


def too_hard(answer: str) -> bool:
    """Longer or deeper than any real answer: not worth a parser's time, and dangerous to its
    stack."""
    if len(answer) > MAX_MATHS:
        return True
    depth = deepest = 0
    for character in answer:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def full_maths(answer: str, gold: str) -> bool:
    """Compare as mathematics; failing that, without degree and percent signs once more. May
    hang."""
    answer, gold = tidy(answer), gold_answer(gold)
    if _equivalent(answer, gold):
        return True
    plain, plain_gold = without_signs(answer), without_signs(gold)
    return (plain, plain_gold) != (answer, gold) and _equivalent(plain, plain_gold)


def _equivalent(answer: str, gold: str) -> bool:
    from math_verify import verify  # a second of import, wanted in the grade worker only

    parsed_gold, parsed = _parse(gold), _parse(answer)
    return bool(
        parsed_gold and parsed and verify(list(parsed_gold), list(parsed), timeout_seconds=None)
    )


@lru_cache(maxsize=256)
def _parse(answer: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    # Both functions warn once that their own time limit is off; ours is the one that also works
    # inside C code.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    config = [LatexExtractionConfig()]
    return tuple(parse(f"${answer}$", config, fallback_mode="no_fallback", parsing_timeout=None))
