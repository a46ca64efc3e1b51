"""Places of pictures, told in words."""

from __future__ import annotations

import pytest

from zppo_protocol.places import PLACE, in_words, media_names, without_places
from zppo_protocol.values import PictureReference, VideoReference

PICTURE = PictureReference(path="a.png", sha256="0" * 64, width=8, height=8)
FILM = VideoReference(frames=(PICTURE,), seconds=(0.0,))


def test_each_kind_has_numbers_of_its_own() -> None:
    assert media_names([PICTURE, FILM, PICTURE]) == ["picture 1", "video 1", "picture 2"]


@pytest.mark.parametrize(
    ("text", "media", "words"),
    [
        (f"In {PLACE} and{PLACE}", [PICTURE, FILM], "In [picture 1] and[video 1]"),
        (f"And in {PLACE}?", [PICTURE, FILM, PICTURE], "And in [picture 2]?"),
        ("Before the words.", [PICTURE], "Before the words."),
        (f"Of {PLACE}nobody", [], "Of nobody"),
    ],
)
def test_a_text_says_what_stands_where(
    text: str, media: list[PictureReference | VideoReference], words: str
) -> None:
    assert in_words(text, media) == words
    assert without_places(words) == words
