"""A question: what is asked, what it refers to, and what counts as right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from zppo_protocol.places import PLACE, in_words
from zppo_protocol.values import ChatMessage, Media, PictureReference


class Question(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the corpus: the last turn of a user, and the conversation that led to it. Pictures
    and videos have their places in the turns, or stand before the last one
    (`zppo_protocol.places`).

    `grader` names a rule of `zppo.grading`; the buffer keeps questions, never responses.
    """

    id: str
    text: str
    """The last turn; what BCQ, NCQ and hints rewrite."""
    answer: str
    media: tuple[Media, ...] = ()
    grader: str = "math"
    row: str = ""
    """All columns as JSON, where a reward of the user's reads them."""
    earlier: tuple[ChatMessage, ...] = ()
    """The turns before it, the row's own system message first if it has one."""
    own_grader: bool = False
    """Whether the row itself names the grader."""

    @property
    def has_system(self) -> bool:
        """Whether the row brings a system message, which takes the place of the run's."""
        return bool(self.earlier) and self.earlier[0].role == "system"

    @property
    def words(self) -> str:
        """The last turn for whoever is shown no pictures."""
        return in_words(self.text, self.media)

    @property
    def has_places(self) -> bool:
        """Whether its pictures and videos have places in the turns."""
        return PLACE in self.text or any(PLACE in message.content for message in self.earlier)

    @property
    def characters(self) -> int:
        """Length of all turns."""
        return len(self.text) + sum(len(message.content) for message in self.earlier)


def digest(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of ids, turns, answers, pictures and videos as models are shown them, rows and
    graders that rows name, in their order: the same digest is the same corpus to a data cursor."""
    sha = hashlib.sha256()
    for question in questions:
        sha.update(msgspec.json.encode(_content(question)) + b"\n")
    return sha.hexdigest()


def _content(question: Question) -> tuple[object, ...]:
    """What a resumed run must find again. What a row does not have takes no part, so a corpus of
    plain questions keeps the digest it always had."""
    told = {
        "row": question.row,
        "earlier": question.earlier,
        "media": [_shown(one) for one in question.media],
        "grader": question.grader if question.own_grader else "",
    }
    extra = {name: value for name, value in told.items() if value}
    plain = (question.id, question.text, question.answer)
    return (*plain, extra) if extra else plain


def _shown(media: Media) -> object:
    """What is in the files and at which size it is shown; where the files lie takes no part."""
    if isinstance(media, PictureReference):
        return [media.sha256, media.width, media.height]
    return [[_shown(one) for one in media.frames], media.seconds]
