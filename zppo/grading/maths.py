"""Mathematical equivalence of two answers (paper, section Reward).

The quick half decides by text, names, units and exact numbers and cannot hang. The full half parses
LaTeX and compares what it means (`zppo.grading.equivalence`), which may run for ever on hostile
input: call it where the process can be killed. Neither half ever evaluates text as code: only
math-verify's LaTeX grammar is used, not its expression parser, which goes through Python's
compiler.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from zppo.grading import names, units
from zppo.grading.boxes import last_boxed, tidy, unstyled
from zppo.grading.notation import SIGNS, brackets, part_meant, plain, without_signs
from zppo.grading.numbers import same_number

MAX_MATHS = 1_000
"""Characters of an answer that is still read as mathematics; anything longer must be equal as
text."""
MAX_DEPTH = 30
"""Nested braces and brackets of such an answer."""

_MARKED = re.compile(r"^####[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ ,'’-]+[^\W\d_]+)*", re.UNICODE)
_WORD_LAST = re.compile(r"(?:[a-zA-Z]{3,}\s*|\}(?:\^\{?\d\}?)?)$")
"""What may be a unit that is not known; one or two letters at the end are variables."""
_OR = re.compile(r"\s*,?\s*(?<![a-zA-Z\\])or(?![a-zA-Z])\s*|\s*\\(?:lor|vee)(?![a-zA-Z])\s*")


def gold_content(gold: str) -> str:
    """The gold answer as it is written; of a worked solution, that in its last box or behind the
    `####` of its end."""
    boxed, marked = last_boxed(gold), _MARKED.search(gold)
    return boxed or (marked[1] if marked else gold)


def gold_answer(gold: str) -> str:
    """The tidy gold answer."""
    return tidy(gold_content(gold))


def quick_maths(answer: str, gold: str) -> bool | None:
    """Compare by text, words, names, units and exact numbers; None when only mathematics can
    decide. Never hangs."""
    text, gold_text = tidy(answer), gold_answer(gold)
    if _same_text(text, gold_text):
        return True
    if not text or not gold_text or too_hard(text) or too_hard(gold_text):
        return False
    if _WORDS.fullmatch(text) and _WORDS.fullmatch(gold_text):
        return False
    same = names.same_name(text, gold_text)
    if same is not None or units.contradict(
        units.quantity(answer), units.quantity(gold_content(gold))
    ):
        return bool(same)
    text, gold_text = _readings(answer, gold)
    if _same_text(text, gold_text):
        return True
    kinds = {brackets(text), brackets(gold_text)}
    return False if kinds == {"(", "{"} else _quick_numbers(text, gold_text)


def _readings(answer: str, gold: str) -> tuple[str, str]:
    """Both answers in one notation, without their units, and without the half of a choice that is
    not asked for."""
    text, gold_text = units.values(units.quantity(answer), units.quantity(gold_content(gold)))
    return plain(part_meant(text, gold_text)), plain(part_meant(gold_text, text))


def _same_text(answer: str, gold: str) -> bool:
    """Equal as they stand, or without degree and percent signs."""
    if _WORDS.fullmatch(gold):
        return answer.casefold() == gold.casefold()
    forms = [(answer, gold), (without_signs(answer), without_signs(gold))]
    return any(one != "" and one.replace(" ", "") == other.replace(" ", "") for one, other in forms)


def _quick_numbers(answer: str, gold: str) -> bool | None:
    """Plain numbers; one with a percent sign is that number, or a hundredth of it where the other
    has none."""
    plain_answer, plain_gold = without_signs(answer), without_signs(gold)
    same = same_number(plain_answer, plain_gold)
    if same is False and "%" in answer and "%" not in gold:
        return same_number(plain_answer, plain_gold, scale=100)
    if same is False and "%" in gold and "%" not in answer:
        return same_number(plain_answer, plain_gold, gold_scale=100)
    return same


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
    text, gold_text = _readings(answer, gold)
    if _equivalent(text, gold_text):
        return True
    signs = SIGNS.search(text) or SIGNS.search(gold_text)
    return bool(signs) and _equivalent(without_signs(text), without_signs(gold_text))


def _equivalent(answer: str, gold: str) -> bool:
    from zppo.grading.equivalence import (
        equivalent,  # a second of import, wanted in the grade worker only
    )

    tree, gold_tree = _parse(answer), _parse(gold)
    return tree is not None and gold_tree is not None and equivalent(tree, gold_tree)


@lru_cache(maxsize=256)
def _parse(answer: str) -> Any | None:
    """The tree of a tidy answer, or None; `x < 1 or x > 2` is read part by part, since the grammar
    knows no `or`."""
    from zppo.grading.equivalence import either

    parts = _OR.split(unstyled(answer)) if "or" in answer or "\\vee" in answer else []
    if len(parts) > 1 and all(parts):
        tree = either([_parse_latex(part) for part in parts])
        if tree is not None:
            return tree
    return _parse_latex(answer)


def _parse_latex(answer: str) -> Any | None:
    """The tree of all of the answer. math-verify's own `parse` would take a fraction out of any
    text around it."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from math_verify.parser import parse_latex_cached

    # The functions warn once that their own time limit is off; ours is the one that also works
    # inside C code.
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    config = NormalizationConfig(
        units=bool(_WORD_LAST.search(answer)), malformed_operators=True, nits=True, boxed="none"
    )
    try:
        return parse_latex_cached(normalize_latex(answer, config))
    except Exception:  # whatever the grammar trips over is no mathematics
        return None
