"""The judge: for free-form answers a language model compares the response with the gold answer
(paper, Reward).

It is a comparator, not a solver, decodes greedily, and must reply with one JSON object; anything
else counts as wrong. With a rubric it reads the whole response and gives a score instead.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from zppo.grading.boxes import last_boxed, parse_answer, shown
from zppo_protocol.values import Grade


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    verdict: Literal["correct", "wrong"]


def said(reply: str) -> bool | None:
    """Whether the judge's reply, after any thinking, is exactly the JSON object that says
    `correct`, or the one that says `wrong`; None: it is neither."""
    final = reply.rpartition("</think>")[2].strip()
    try:
        return msgspec.json.decode(final, type=Verdict).verdict == "correct"
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None


def says_correct(reply: str) -> bool:
    """Whether the judge finds the answer right; a reply without a verdict counts as wrong."""
    return said(reply) is True


def judged(reply: str, response: str) -> Grade:
    """The grade of a response by the judge's reply on it."""
    content, verdict = last_boxed(response), said(reply)
    answer = None if content is None else shown(content)
    return Grade(reward=float(verdict is True), answer=answer, undecided=verdict is None)


class Score(Struct, frozen=True, forbid_unknown_fields=True):
    score: Annotated[float, Meta(ge=0.0, le=1.0)]


def scored(reply: str, response: str) -> Grade:
    """The grade of a response by a reply that must be `{"score": NUMBER}`, from 0 to 1; with any
    other reply the reward could not be had."""
    final = reply.rpartition("</think>")[2].strip()
    answer = parse_answer(response)
    try:
        return Grade(reward=msgspec.json.decode(final, type=Score).score, answer=answer)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        note = f"the rubric got no score from 0 to 1: {final[:80]!r}"
        return Grade(reward=0.0, answer=answer, note=note, failed=True)
