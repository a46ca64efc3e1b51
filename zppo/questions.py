"""A question: what is asked, what it refers to, and what counts as right."""

from __future__ import annotations

from msgspec import Struct

from zppo_protocol.messages import MediaReference


class Question(Struct, frozen=True, kw_only=True):
    """One row of the corpus. `grader` names a rule of `zppo.grading`; the buffer keeps questions, never responses."""

    id: str
    text: str
    answer: str
    media: tuple[MediaReference, ...] = ()
    grader: str = "math"
