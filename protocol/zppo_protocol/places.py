"""Where pictures and videos stand between the words of a prompt.

The invariant: in texts of ours, those of questions and of the messages of a `Prompt`, the character
`PLACE` is the place of a picture or video and nothing else. Either each one has a place, in their
order, or none has; then all stand before the words of the last message of the user. Texts of others
(data, models, settings) lose the character before they become ours: `without_places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final

from zppo_protocol.values import Media

PLACE: Final = "\ufffc"
"""U+FFFC OBJECT REPLACEMENT CHARACTER."""


def without_places(text: str) -> str:
    """A text in which nothing has a place."""
    return text.replace(PLACE, "")


def media_names(media: Sequence[Media]) -> list[str]:
    """What each is called where it is not shown, e.g. `picture 1`, `video 1`, `picture 2`."""
    numbers = {"picture": count(1), "video": count(1)}
    return [f"{one.kind} {next(numbers[one.kind])}" for one in media]


def in_words(text: str, media: Sequence[Media]) -> str:
    """A text for whoever is not shown the `media` of its question or prompt: `[picture 1]` for a
    place. The text may lack the beginning, so its places are those of the last ones."""
    places = text.count(PLACE)
    if not places:
        return text
    if places > len(media):
        return without_places(text)
    words, *others = text.split(PLACE)
    names = media_names(media)[len(media) - places :]
    return words + "".join(f"[{name}]{after}" for name, after in zip(names, others, strict=True))
