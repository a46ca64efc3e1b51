r"""What an answer names rather than computes: a numeral of another base, an angle or a segment by
its points.

The LaTeX grammar reads `1011_2` as 1011 and `\angle ABC` as a product, whose order means nothing.
"""

from __future__ import annotations

import re

from zppo.grading.boxes import unstyled

_WORDS = dict(
    zip(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        range(2, 11),
        strict=True,
    )
)
_NUMERAL = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*_\s*\{?\s*\(?\s*(\d{1,2}|[a-z]{3,5})\s*\)?\s*\}?")
_POINTS = re.compile(
    r"(?:\\(angle|measuredangle|triangle|overline|overrightarrow|vec|overleftrightarrow|widehat)|([∠△]))"
    r"\s*\{?\s*((?:[A-Z]\s*){2,4})\}?"
)
_FREE = {"triangle", "△"}
_DIRECTED = {"overrightarrow", "vec"}


def numeral(answer: str) -> tuple[str, int] | None:
    r"""(digits, base) of a tidy answer such as `1011_2`, `2F_{16}`, `201_{\text{three}}`."""
    match = _NUMERAL.fullmatch(unstyled(answer))
    if match is None:
        return None
    base = _WORDS.get(match[2], int(match[2]) if match[2].isdigit() else 0)
    if not 2 <= base <= 36 or any(int(character, 36) >= base for character in match[1]):
        return None
    return match[1].upper().lstrip("0") or "0", base


def points(answer: str) -> tuple[str, str] | None:
    r"""(kind, points in a standard order) of `\angle ABC`, `\overline{AB}`, `\triangle ABC`.

    An angle and a segment read the same from both ends, a triangle in any order; a ray or vector in
    one order only.
    """
    match = _POINTS.fullmatch(answer)
    if match is None:
        return None
    kind, letters = match[1] or match[2], re.sub(r"\s", "", match[3])
    if kind in _FREE:
        return kind, "".join(sorted(letters))
    return kind, letters if kind in _DIRECTED else min(letters, letters[::-1])


def same_name(answer: str, gold: str) -> bool | None:
    """Whether two tidy answers are the same name; None if they are not names of one sort."""
    for name in (numeral, points):
        one, other = name(answer), name(gold)
        if one is not None and other is not None:
            return one == other
    return None
