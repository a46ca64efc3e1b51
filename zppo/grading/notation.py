r"""One notation for what is written in several: the same mathematics, in the signs that the LaTeX
grammar knows.

All of it is text for text, in time linear in the answer. Nothing here decides whether an answer is
right.
"""

from __future__ import annotations

import re

from zppo.grading.boxes import BOX, unstyled

SIGNS = re.compile(
    r"\^\s*\{?\s*(?:\\circ|\\(?:text|mathrm)\s*\{\s*o\s*\})\s*\}?"
    r"|\\(?:deg|degrees?|textdegree|circ)(?![a-zA-Z])|[°º˚]|\\?%"
)
"""Degree and percent signs, which may be missing (paper, section Reward)."""
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\deg(?:rees?)?(?![a-zA-Z])|[°º˚])"
)
_MIXED = re.compile(r"(?<![\d.,/\\}])(?<!\d )(\d+) (\d+) ?/ ?(\d+)(?![\d./])")
_BUILDER = re.compile(
    r"\\\{\s*[a-z]\s*(?:\\in\s*\\(?:mathbb\s*\{?\s*R\s*\}?|R)\s*)?(?:\\mid|\\vert|\||:)\s*(?P<condition>.*)\\\}",
    re.DOTALL,
)
_LABELLED = re.compile(
    r"\(?\s*\(([A-J])\)\s*\)?\s*(?P<rest>(?!(?:or|and|nor)\b|[,;/&]|\([A-J]\))\S.*)", re.DOTALL
)
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?\.?")
_LISTED = re.compile(r"(?:\\\{|[(\[])(?P<list>.*)(?:\\\}|[)\]])", re.DOTALL)
_BRACKET = re.compile(r"\\?[{}]|[()\[\]]")
_SAME = [
    (BOX, "{"),
    (re.compile(r"\\(?:langle|lparen)(?![a-zA-Z])"), "("),
    (re.compile(r"\\(?:rangle|rparen)(?![a-zA-Z])"), ")"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"^<([^<>=]*,[^<>=]*)>$"), r"(\1)"),
    (
        re.compile(r"(?<![a-zA-Z\\\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{2,4})(?![\d.])"),
        r"\1 \\times 10^{\2}",
    ),
    (re.compile(r"\\[if]math(?![a-zA-Z])|\\mathrm\s*\{\s*i\s*\}"), "i"),
]


def plain(answer: str) -> str:
    r"""A tidy answer in one notation: brackets of vectors, mixed numbers, `\{x : x < 1\}`, degrees
    of sines."""
    for pattern, replacement in _SAME:
        answer = pattern.sub(replacement, answer)
    builder = _BUILDER.fullmatch(answer)
    answer = builder["condition"].strip() if builder else answer
    if _TRIGONOMETRIC.search(answer):
        answer = _DEGREES.sub(r"{(\\frac{\1\\pi}{180})}", answer)
    return _MIXED.sub(_mixed, answer)


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    proper = len(over) <= len(under) and int(over[:20]) < int(under[:20]) and over[0] != "0"
    return rf"{whole}\frac{{{over}}}{{{under}}}" if proper else match[0]


def without_signs(answer: str) -> str:
    """The answer without degree and percent signs."""
    return " ".join(SIGNS.sub("", answer).split())


def brackets(answer: str) -> str | None:
    r"""What encloses the list that a tidy answer is: `{` (a set), `(` (a tuple or interval) or
    nothing."""
    inner, depth = _LISTED.fullmatch(answer), 0
    if inner is None or "," not in inner["list"]:
        return None
    for bracket in _BRACKET.findall(inner["list"]):
        depth += 1 if bracket[-1] in "{([" else -1
        if depth < 0:  # (1,2),(3,4): the first bracket does not enclose the whole
            return None
    return "{" if answer.startswith("\\{") else "("


def part_meant(answer: str, other: str) -> str:
    r"""Of a choice with its letter, `\textbf{(B)}\ 5`, the half to compare with `other`: letter
    against letter."""
    labelled = _LABELLED.fullmatch(unstyled(answer))
    if labelled is None:
        return answer
    bare = unstyled(other)
    if _LETTER.fullmatch(bare) or _LABELLED.fullmatch(bare):
        return labelled[1]
    return labelled["rest"]
