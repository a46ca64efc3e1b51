r"""The final answer of a response: the content of its last `\boxed{...}` (paper, section Reward).

The invariant: every function here takes time linear in the text, whatever a model wrote.
"""

from __future__ import annotations

import re

MAX_ANSWER = 500
"""Characters of an answer that is shown; gold answers of the paper's corpus have at most 512."""

BOX = re.compile(r"\\(?:f?boxed|fbox)\s*\{")
_ESCAPED_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TYPESETTING = [
    (re.compile(r"(?<!\\)\\[,!;:> ]|\\q?quad\b|~"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])\.?"), ""),
    (re.compile(r"\\?\$|\\[()]"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
]
"""Differences between answers that are differences of looks only, and what stands for them."""
_STYLE = (
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mbox|operatorname|underline|rm)"
    r"(?![a-zA-Z])"
)
_STYLED = re.compile(_STYLE + r"\s*\{([^{}]*)\}")


def last_box(text: str) -> tuple[int, int, str] | None:
    r"""(start, end, content) of the last `\boxed{...}`, or None; one that is opened last and never
    closed takes back the answers before it.

    Escaped braces `\{` and `\}` do not count. Of nested boxes the outermost wins, as a reader would
    see it.
    """
    stack: list[tuple[int, int] | None] = []
    found: tuple[int, int, int] | None = None
    opened = {match.end() - 1: match.start() for match in BOX.finditer(text)}
    for match in _ESCAPED_OR_BRACE.finditer(text):
        position = match.start()
        if match.group() == "{":
            start = opened.get(position)
            stack.append(None if start is None else (start, position + 1))
        elif match.group() == "}" and stack:
            box = stack.pop()
            if box is not None:
                found = (*box, position)
    if found is None or any(box is not None and box[0] > found[0] for box in stack):
        return None
    return found[0], found[2] + 1, text[found[1] : found[2]]


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, stripped of outer white space, or None."""
    box = last_box(text)
    return None if box is None else box[2].strip()


def unstyled(answer: str) -> str:
    r"""The answer with every `\text{...}`, `\textbf{...}` and the like replaced by a blank and its
    content."""
    return " ".join(_STYLED.sub(r" \1 ", answer).split())


def tidy(answer: str) -> str:
    r"""An answer in the form we compare and show: the same mathematics, without differences of
    typesetting.

    Takes off a box around the whole, collapses white space, drops `$`, spacing and sizing commands
    and a full stop at the end, unwraps a whole-answer `\text{...}`, and writes `\dfrac` as `\frac`.
    """
    box = last_box(answer := answer.strip())
    if box is not None and box[:2] == (0, len(answer)):
        answer = box[2]
    for pattern, replacement in _TYPESETTING:
        answer = pattern.sub(replacement, answer)
    answer = " ".join(answer.split())
    answer = answer.rstrip(".").rstrip() if len(answer) > 1 else answer
    wrapped = _STYLED.fullmatch(answer)
    return wrapped.group(1).strip() if wrapped else answer


def shown(content: str) -> str | None:
    """The content of a box as an answer to show and to deduplicate by, or None if nothing is in
    it."""
    return tidy(content)[:MAX_ANSWER] or None


def parse_answer(text: str) -> str | None:
    """The last boxed answer in tidy form, for deduplication and display, or None without a box or
    with an empty one."""
    content = last_boxed(text)
    return None if content is None else shown(content)
