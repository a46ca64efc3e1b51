"""A question: what is asked, what it refers to, and what counts as right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from zppo_protocol.values import MediaReference


class Question(Struct, frozen=True, kw_only=True):
    """One row of the corpus. `grader` names a rule of `zppo.grading`; the buffer keeps questions,
    never responses."""

    id: str
    text: str
    answer: str
    media: tuple[MediaReference, ...] = ()
    grader: str = "math"


def digest(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of ids, texts and answers in their order: the same digest is the same corpus to
    a data cursor."""
    sha = hashlib.sha256()
    for question in questions:
        sha.update(msgspec.json.encode((question.id, question.text, question.answer)) + b"\n")
    return sha.hexdigest()
