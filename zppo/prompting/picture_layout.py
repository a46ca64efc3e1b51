"""How pictures and videos lie in the prompts of one model: the one place that engines, the trainer
and the checks at launch ask.

A *medium* is what a question has, a picture or a whole video, and what a chat template writes a
mark for. A *view* is what one grid of features is made of: a picture, or the frames that a model
merges in time. A picture is one view. A video that is shown to the model as such is as many as it
has merged frames, each behind its time and all in the place of one mark; else its frames are
pictures like any other, each with a mark of its own and the words of its time before it
(`zppo.prompting.content`).

Which of the two it is, is decided once for a model, when its folder is read. In a prompt that is
made it is read off the marks that stand there, so whoever reads tokens of others, the trainer or a
teacher that scores, follows whoever made them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zppo.errors import UserError, count_of
from zppo.prompting.content import frame_time
from zppo.prompting.picture_families import (
    PictureFamily,
    Tokenizer,
    UnreadPictures,
    VideoInput,
)
from zppo_protocol.values import Media, PictureReference, VideoReference, pictures_of


class MarkError(ValueError):
    """The prompt holds more or fewer marks of pictures or videos than it has of them."""


@dataclass(frozen=True)
class View:
    """What one grid of features is made of. `features` is how many there are, laid out in a `grid`
    of rows and columns where the family turns. `size` is (width, height) in pixels to which the
    frames of a video are brought; None for a picture, of which the model's processor decides."""

    frames: tuple[PictureReference, ...]
    grid: tuple[int, int]
    features: int
    size: tuple[int, int] | None = None

    @property
    def of_video(self) -> bool:
        return self.size is not None


@dataclass(frozen=True)
class Stretch:
    """A part of an expansion: words, or all that stands for a view."""

    ids: list[int]
    view: View | None = None


@dataclass(frozen=True)
class Placed:
    """A view in a prompt: its features are the tokens [start, start + length) of the prompt that
    have the mark's id. `medium` counts the pictures and videos of the prompt from 0."""

    medium: int
    view: View
    start: int
    length: int


class PictureLayout:
    """Pictures and videos in the prompts of one model. `frames_because` says why it is shown the
    frames of a video as pictures; empty where it is shown the video."""

    def __init__(
        self, family: PictureFamily, tokenizer: Tokenizer, frames_because: str = ""
    ) -> None:
        self.family = family
        self.frames_because = frames_because
        self._tokenizer = tokenizer
        self._pictures: dict[tuple[int, int], list[int]] = {}
        self._times: dict[str, list[int]] = {}

    @property
    def shows_videos(self) -> bool:
        return self.family.video is not None and not self.frames_because

    @property
    def problem(self) -> str:
        """Why no picture and no video can be shown to the model, as a whole sentence; empty if they
        can."""
        return self.family.problem if isinstance(self.family, UnreadPictures) else ""

    def check(self) -> None:
        """Raise UserError if there is a `problem`."""
        if self.problem:
            raise UserError(self.problem)

    @property
    def marks(self) -> frozenset[int]:
        """Ids of tokens that stand for features."""
        video = self.family.video
        return frozenset({self.family.mark} if video is None else {self.family.mark, video.mark})

    def expansion(self, medium: Media) -> list[int]:
        """Token ids in the place of the mark of a picture, or of a video that is shown as such.
        Raises ValueError for what the model does not take."""
        return [one for stretch in self._stretches(medium) for one in stretch.ids]

    def shown_as(self, medium: Media, *, as_video: bool) -> list[list[int]]:
        """The expansion of a picture or video, or with `as_video` false those of its frames. Raises
        ValueError as `expansion` does."""
        whole = as_video or not isinstance(medium, VideoReference)
        return [self.expansion(one) for one in ([medium] if whole else pictures_of([medium]))]

    def expand(self, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """The prompt with every mark expanded; `media` are its pictures and videos in order.
        Raises MarkError unless there are as many marks as there are of them, else as `expansion`
        does."""
        waiting = self._by_mark(media, as_videos=self.shows_videos)
        for mark, media_of_mark in waiting.items():
            if ids.count(mark) != len(media_of_mark):
                kind, count = self._kind(mark), len(media_of_mark)
                raise MarkError(
                    f"the prompt holds {count_of(ids.count(mark), 'mark')} of {kind}s for "
                    f"{count_of(count, kind)}"
                )
        expanded = list[int]()
        for one in ids:
            expanded += self.expansion(waiting[one].popleft()[1]) if one in waiting else [one]
        return expanded

    def placed(self, ids: np.ndarray, media: Sequence[Media]) -> list[Placed]:
        """Where the views of a prompt [P] stand, in order. Raises ValueError unless it is what
        `expand` makes of them, its videos shown as such or as frames: then the ids were made with
        other settings of the processors, or of other pictures."""
        video = self.family.video
        as_videos = video is not None and bool((ids == video.mark).any())
        waiting = self._by_mark(media, as_videos=as_videos)
        counts = {mark: len(media_of_mark) for mark, media_of_mark in waiting.items()}
        places = np.flatnonzero(np.isin(ids, list(waiting)))
        found, cursor = list[Placed](), 0
        while (ahead := places[places >= cursor]).size:
            mark = int(ids[ahead[0]])
            if not waiting[mark]:
                kind = self._kind(mark)
                raise ValueError(f"more marks of {kind}s follow the last of {counts[mark]} {kind}s")
            number, medium = waiting[mark].popleft()
            stretches = self._stretches(medium)
            expansion = [one for stretch in stretches for one in stretch.ids]
            start = int(ahead[0]) - expansion.index(mark)
            if start < cursor or ids[start : start + len(expansion)].tolist() != expansion:
                raise _other(medium, counts[mark] - len(waiting[mark]), counts[mark], expansion)
            for stretch in stretches:
                if stretch.view is not None:
                    found.append(Placed(number, stretch.view, start, len(stretch.ids)))
                start += len(stretch.ids)
            cursor = start
        for mark, media_of_mark in waiting.items():
            for _, medium in media_of_mark:
                number = counts[mark] - len(media_of_mark) + 1
                raise _other(medium, number, counts[mark], self.expansion(medium))
        return found

    def positions(self, length: int, placed: Sequence[Placed]) -> tuple[np.ndarray, int]:
        """Positions [3, P] int64 of a prompt of `length` tokens, in time, rows and columns, and
        what is added to the place of every token behind it. Of a family that does not turn, places
        themselves."""
        places = np.arange(length, dtype=np.int64)
        positions = np.broadcast_to(places, (3, length)).copy()
        if not self.family.turns:
            return positions, 0
        shift = 0
        for one in placed:
            (rows, columns), end = one.view.grid, one.start + one.length
            first = one.start + shift
            cells = np.arange(rows * columns)
            positions[:, one.start : end] = first
            positions[1, one.start : end] += cells // columns
            positions[2, one.start : end] += cells % columns
            shift = first + max(rows, columns) - end
            positions[:, end:] = places[end:] + shift
        return positions, shift

    def _by_mark(
        self, media: Sequence[Media], *, as_videos: bool
    ) -> dict[int, deque[tuple[int, Media]]]:
        """(number, medium) by the mark that is written for it, in order: a template may bring all
        of one kind before those of the other."""
        waiting = {mark: deque[tuple[int, Media]]() for mark in sorted(self.marks)}
        video = self.family.video
        for number, medium in enumerate(media):
            if as_videos and video is not None and isinstance(medium, VideoReference):
                waiting[video.mark].append((number, medium))
            else:
                waiting[self.family.mark] += ((number, one) for one in pictures_of([medium]))
        return waiting

    def _kind(self, mark: int) -> str:
        return "picture" if mark == self.family.mark else "video"

    def _stretches(self, medium: Media) -> list[Stretch]:
        if isinstance(medium, PictureReference):
            grid = self.family.grid(medium.width, medium.height)
            if grid not in self._pictures:
                self._pictures[grid] = self.family.expansion(self._tokenizer, grid)
            ids = self._pictures[grid]
            return [Stretch(ids, View((medium,), grid, ids.count(self.family.mark)))]
        assert self.family.video is not None, "its frames are pictures"
        return list(self._of_video(self.family.video, medium))

    def _of_video(self, video: VideoInput, medium: VideoReference) -> Iterator[Stretch]:
        width, height = size = video.size(medium)
        grid = height // video.settings.side, width // video.settings.side
        features = grid[0] * grid[1]
        for second, frames in video.merged(medium):
            yield Stretch([*self._words(frame_time(second)), video.start])
            yield Stretch([video.mark] * features, View(frames, grid, features, size))
            yield Stretch([video.end])

    def _words(self, text: str) -> list[int]:
        if text not in self._times:
            self._times[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._times[text]


def _other(medium: Media, number: int, count: int, expansion: Sequence[int]) -> ValueError:
    """That other tokens stand where one of `count` pictures or videos should be."""
    first = next(pictures_of([medium]))
    size = f"{first.width} × {first.height} pixels"
    what = f"picture {number} of {count}, of {size}"
    if isinstance(medium, VideoReference):
        what = f"video {number} of {count}, of {count_of(len(medium.frames), 'frame')} of {size}"
    return ValueError(
        f"{what}, should be {count_of(len(expansion), 'token')}, and other ones stand in the prompt"
    )
