r"""Compressed candidate texts (paper, step 4): short, same style for teacher's and student's, same
final answer.

The invariant: a compressed text ends in exactly the boxed answer of the text it was made from, or
in none if that had none. Compression can never turn a wrong candidate into a right one or back.
What the teacher wrote is kept only if it obeys; otherwise `by_rule` shortens the text without a
model.
"""

from __future__ import annotations

import re

from zppo.grading.boxes import BOX, last_box
from zppo.prompting.prompts import neutral

CHARACTERS_PER_TOKEN = 4
"""A usual rate for English and LaTeX; the rule has no tokenizer and bounds characters instead."""

_PASSES = 20
"""Boxes within boxes' names that are taken out one by one; deeper nesting is hostile and loses its
backslashes."""

_THINK = re.compile(r"<(/?)think\s*>", re.IGNORECASE)
_EXPLORATION = re.compile(
    r"(?:wait|hmm+|hold on|alternatively|actually|maybe|oops|on second thought|okay|"
    r"let me (?:try|check|think|verify|see|re-?\w+|double.check)|let's (?:try|check|see|verify))\b",
    re.IGNORECASE,
)


def written(reply: str, text: str, max_lines: int) -> str | None:
    """The compressed form of candidate `text` in the teacher's words, or None if its `reply` is not
    faithful."""
    return "\n".join(lines(visible(reply))) if faithful(reply, text, max_lines) else None


def faithful(reply: str, text: str, max_lines: int) -> bool:
    """Whether the reply has text, at most `max_lines` lines, and the very answer of `text` in its
    last box."""
    if _thinks_to_the_end(reply):
        return False
    kept = lines(visible(reply))
    return 0 < len(kept) <= max_lines and _answer("\n".join(kept)) == _answer(neutral(text))


def by_rule(text: str, max_lines: int, max_tokens: int) -> str:
    r"""Shorten without a model: the last essential lines, then the final `\boxed{...}` verbatim,
    where the text ends.

    Thoughts, blank lines and lines that explore or retry go first. The result has at most
    `max_lines` lines and about `max_tokens` tokens; a box longer than that is kept whole all the
    same.
    """
    box = _box_line(neutral(text))
    steps, lead = _steps_and_lead(neutral(visible(text)), box)
    budget = max_tokens * CHARACTERS_PER_TOKEN
    beside = f" {box}" if box else ""
    final = (_tail(lead, budget - len(beside)) + beside).strip()
    kept = [final] if final else []
    room = budget - len(final)
    for line in reversed([step for step in steps if not _EXPLORATION.match(step)]):
        room -= len(line) + 1
        if room < 0 or len(kept) == max_lines:
            break
        kept.insert(0, line)
    return "\n".join(kept)


def _steps_and_lead(text: str, box: str) -> tuple[list[str], str]:
    """The lines before the final box, and what stands on the box's own line before it.

    Without a box the last line takes the place of the lead, so that something is always left.
    """
    found = last_box(text)
    in_text = found is not None and _box_line(text) == box
    head = text[: found[0]] if found is not None and in_text else text
    kept = lines(head if box else _unboxed(head))
    ends_open = bool(kept) and (not box or (in_text and not head.rstrip(" \t").endswith("\n")))
    return (kept[:-1], kept[-1]) if ends_open else (kept, "")


def _unboxed(text: str) -> str:
    """A text without a whole box also without the beginnings of one, which dropping lines might
    complete."""
    for _ in range(_PASSES):
        text, removed = BOX.subn("", text)
        if not removed:
            return text
    return text.replace("\\", "")


def _tail(line: str, room: int) -> str:
    """The end of a line, cut at a space where there is one, in at most `room` characters."""
    if len(line) <= room:
        return line
    tail = line[len(line) - max(room, 0) :]
    return tail[tail.find(" ") + 1 :]


def _box_line(text: str) -> str:
    r"""The last `\boxed{...}` of a text, verbatim but on one line, or nothing."""
    found = last_box(text)
    return (
        ""
        if found is None
        else " ".join(part.strip() for part in text[found[0] : found[1]].splitlines())
    )


def _answer(text: str) -> list[str] | None:
    """What the last box holds, up to white space, or None without a box."""
    found = last_box(text)
    return None if found is None else found[2].split()


def lines(text: str) -> list[str]:
    """Non-blank lines without outer white space."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def visible(text: str) -> str:
    """What follows the last thought; a text that is nothing but thought is shown as it is."""
    ends = [match.end() for match in _THINK.finditer(text) if match.group(1)]
    after = neutral(text[ends[-1] :]) if ends else ""
    return after or neutral(text)


def _thinks_to_the_end(reply: str) -> bool:
    """Whether a thought was opened and never closed: the reply was cut off before it said
    anything."""
    tags = list(_THINK.finditer(reply))
    return bool(tags) and not tags[-1].group(1)
