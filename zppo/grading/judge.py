"""The judge: for free-form answers a language model compares the response with the gold answer
(paper, Reward).

It is a comparator, not a solver, decodes greedily, and must reply with one JSON object; anything
else counts as wrong.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from zppo.grading.boxes import last_boxed, shown
from zppo_protocol.values import Grade


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    verdict: Literal["correct", "wrong"]


def says_correct(reply: str) -> bool:
    """Whether the judge's reply, after any thinking, is exactly the JSON object that says
    `correct`."""
    final = reply.rpartition("</think>")[2].strip()
    try:
        return msgspec.json.decode(final, type=Verdict).verdict == "correct"
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return False


def judged(reply: str, response: str) -> Grade:
    """The grade of a response by the judge's reply on it."""
    content = last_boxed(response)
    return Grade(
        reward=float(says_correct(reply)), answer=None if content is None else shown(content)
    )
