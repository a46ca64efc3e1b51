r"""Hints that the teacher writes from a correct response, without the answer (Algorithm 5).

The invariant: a hint holds no box, and no word of it is the final answer, whatever the teacher
wrote. Lines with a box go, and words that are the answer become a blank: such a word may stand
there for another reason, but a hint that gives the answer away is worse. A reply of which nothing
is left, or no reply at all, is replaced by the first half of the response. Time is linear in reply
and response.
"""

from __future__ import annotations

import re

from zppo.grading.boxes import last_box, shown
from zppo.prompting.compression import CHARACTERS_PER_TOKEN, lines, visible
from zppo.prompting.prompts import neutral

BLANK = "…"
_BOX = re.compile(r"\\f?boxed")
_PASSES = 20
"""Taking something out may put together what must go as well; a text that needs more passes says
nothing."""


def written(reply: str, response: str, max_lines: int, max_tokens: int) -> str | None:
    """The hint for a correct `response` in the teacher's words, without the answer; None if nothing
    is left of them."""
    hint = _clean(visible(reply), answer_pattern(response), max_lines, max_tokens)
    return hint if _says_something(hint) else None


def by_rule(response: str, max_lines: int, max_tokens: int) -> str:
    """The first half of the response's words, up to its final box, without the answer; a blank if
    nothing is left."""
    text = visible(response)
    found = last_box(text)
    words = (text if found is None else text[: found[0]]).split(" ")
    half = " ".join(words[: max(1, len(words) // 2)])
    return _clean(half, answer_pattern(response), max_lines, max_tokens) or BLANK


def answer_pattern(response: str) -> re.Pattern[str] | None:
    """Finds the final answer of a response, as it stands in the box or tidied, wherever it stands
    as a word by itself.

    A number within a longer one (5 in 3.5) is no word by itself, one with a unit (5km) is. Capitals
    matter for single letters only.
    """
    found = last_box(visible(response))
    forms = {found[2], shown(found[2]) or ""} if found is not None else set()
    wanted = sorted({" ".join(form.split()) for form in forms} - {"", BLANK}, key=len, reverse=True)
    if not wanted:
        return None
    return re.compile("|".join(map(_word, wanted)), re.IGNORECASE if len(wanted[-1]) > 1 else 0)


def _word(answer: str) -> str:
    before, after = _EDGES[_kind(answer[0])], _EDGES[_kind(answer[-1])]
    return before[0] + r"\s".join(map(re.escape, answer.split())) + after[1]


_EDGES = {
    "digit": (r"(?<!\d)(?<!\d[.,])", r"(?!\d)(?![.,]\d)"),
    "letter": (r"(?<!\w)", r"(?!\w)"),
    "sign": ("", ""),
}
"""What must not stand before and after an answer that begins or ends so."""


def _kind(character: str) -> str:
    if character.isdecimal():
        return "digit"
    return "letter" if character.isalnum() else "sign"


def _clean(text: str, answer: re.Pattern[str] | None, max_lines: int, max_tokens: int) -> str:
    """Cut to the limits first, so that no word is cut down to the answer after it was looked
    for."""
    text = "\n".join(lines(_unboxed(text))[:max_lines])[: max_tokens * CHARACTERS_PER_TOKEN]
    for _ in range(_PASSES):
        before, text = text, neutral("\n".join(lines(_unboxed(text))))
        text = answer.sub(BLANK, text) if answer is not None else text
        if text == before:
            return text
    return ""


def _unboxed(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not _BOX.search(line))


def _says_something(text: str) -> bool:
    return any(character.isalnum() for character in text)
