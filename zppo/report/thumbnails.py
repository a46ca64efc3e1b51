"""The pictures of the question browser: small copies, inside the page.

The invariant: a copy is shown only of a file that is still the one that the models saw; else the
page says in words what is missing. A picture that several questions ask about is carried once.
"""

from __future__ import annotations

import base64
import io

import msgspec
from msgspec import Struct, field
from PIL import Image

from zppo.data.pictures import PictureError, read_picture
from zppo_protocol.places import media_names
from zppo_protocol.values import Media, PictureReference, VideoReference

SIDE = 192
"""Longest side of a copy, in pixels."""
MAX_BYTES = 2_000_000
"""Of all copies together, as text in the page."""
MAX_PICTURES = 16
"""Of one question; frames of a video are taken evenly."""


class Shown(Struct, kw_only=True):
    """One picture of a question: which copy, or why there is none, and what stands below it."""

    copy: str | None
    words: str


class Thumbnails(Struct):
    """`copies`: SHA-256 of a picture and its size -> data URL."""

    copies: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def shown(self, encoded: str | None) -> list[Shown]:
        """Pictures of a question, from the column `media` of the rollout store."""
        if encoded is None:
            return []
        media = msgspec.json.decode(encoded, type=list[Media])
        names = media_names(media) if len(media) > 1 else [""]
        views = [view for one, name in zip(media, names, strict=True) for view in _views(one, name)]
        left_out = len(views) - MAX_PICTURES
        if left_out > 0:
            step = len(views) / MAX_PICTURES
            views = [views[int(i * step)] for i in range(MAX_PICTURES)]
        made = [self._one(reference, words) for reference, words in views]
        note = [Shown(copy=None, words=f"{left_out} more are not shown")] if left_out > 0 else []
        return made + note

    def _one(self, reference: PictureReference, words: str) -> Shown:
        name = f"{reference.sha256[:16]}-{reference.width}x{reference.height}"
        if name not in self.copies and name not in self.problems:
            self._add(name, reference)
        if name in self.problems:
            return Shown(copy=None, words=self.problems[name])
        return Shown(copy=name, words=f"{words}{reference.width} × {reference.height} pixels")

    def _add(self, name: str, reference: PictureReference) -> None:
        try:
            url = data_url(read_picture(reference))
        except PictureError as error:
            self.problems[name] = str(error)
            return
        if self.size + len(url) > MAX_BYTES:
            self.problems[name] = "left out, because the page carries no more pictures"
            return
        self.copies[name] = url
        self.size += len(url)


def _views(media: Media, name: str) -> list[tuple[PictureReference, str]]:
    """Pictures with what is said before their size; `name` is empty where there is one medium."""
    begin = f"{name}, " if name else ""
    if isinstance(media, VideoReference):
        shown = zip(media.frames, media.seconds, strict=True)
        return [(frame, f"{begin}{second:.1f} s, ") for frame, second in shown]
    return [(media, begin)]


def data_url(picture: Image.Image) -> str:
    """A copy of at most `SIDE` pixels a side; small ones stay as they are, bit for bit."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    exact = small.width * small.height <= 64 * 64
    kind, file = ("png", io.BytesIO()) if exact else ("jpeg", io.BytesIO())
    small.save(file, format=kind, optimize=True, **({} if exact else {"quality": 70}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
