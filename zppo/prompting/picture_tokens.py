"""How many tokens a picture or a video takes in a prompt of Qwen's vision models, from its size
alone.

Their processors resize a picture, or all frames of a video alike, to multiples of patch · merge
pixels on both sides, with an area within bounds, and make one token of each square of that size; of
a video, one of each square in a few frames that follow each other. What is computed here is that
resize, without a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zppo.config.base import Config, Positive

MARKS = 2
"""`<|vision_start|>` and `<|vision_end|>`."""
MOST_ELONGATED = 200
"""Long side over short side; the processors refuse what is above."""
LEEWAY = 1.05
"""Above the least area of a video, what every frame may have whatever the cap says."""


class PictureTokens(Config, frozen=True, kw_only=True):
    """The processor's settings, as `preprocessor_config.json` of Qwen3-VL and Qwen3.5 has them."""

    patch: Positive = 16
    """pixels of a patch's side"""
    merge: Positive = 2
    """patches of a token's side"""
    min_pixels: Positive = 65_536
    """least area of a resized picture"""
    max_pixels: Positive = 16_777_216
    """largest area of a resized picture"""


@dataclass(frozen=True, kw_only=True)
class VideoTokens:
    """The video processor's settings, as `video_preprocessor_config.json` of the same models has
    them. `frames` that follow each other are merged into one row of tokens; `min_pixels` and
    `max_pixels` bound the areas of all frames together; `most_tokens` is the cap of each frame, in
    tokens, where there is one."""

    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    most_tokens: int | None = None

    @property
    def side(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    def most(self, count: int) -> int:
        """Largest area of `count` frames together."""
        if self.most_tokens is None:
            return self.max_pixels
        frame = min(self.most_tokens * self.side**2, self.max_pixels // count)
        return max(frame, int(self.min_pixels * LEEWAY)) * count


def resized(width: int, height: int, settings: PictureTokens) -> tuple[int, int]:
    """(width, height) in pixels after the processor's resize. Raises ValueError for a picture that
    is more than 200 times as long as it is wide."""
    side = settings.patch * settings.merge
    return _fitted(width, height, side, settings.min_pixels, settings.max_pixels)


def resized_frames(count: int, width: int, height: int, settings: VideoTokens) -> tuple[int, int]:
    """(width, height) in pixels of each of `count` frames after the video processor's resize.
    Raises ValueError as `resized` does.

    The processor refuses fewer frames than it merges; here they count as that many, the last one
    repeated.
    """
    count, side = max(count, settings.frames), settings.side
    if min(width, height) < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    merged = round(count / settings.frames) * settings.frames
    bounds = settings.min_pixels, settings.most(count)
    return _fitted(width, height, side, *bounds, count=count, rounded=merged)


def _fitted(
    width: int, height: int, side: int, least: int, most: int, count: int = 1, rounded: int = 1
) -> tuple[int, int]:
    """Both sides as multiples of `side`, the areas of `count` frames together within the bounds,
    which are looked at with `rounded` of them."""
    if max(width, height) / min(width, height) > MOST_ELONGATED:
        raise ValueError(f"its sides are more than {MOST_ELONGATED} to 1")
    w, h = round(width / side) * side, round(height / side) * side
    if rounded * w * h > most:
        shrink = math.sqrt(count * height * width / most)
        w, h = (max(side, math.floor(one / shrink / side) * side) for one in (width, height))
    elif rounded * w * h < least:
        grow = math.sqrt(least / (count * height * width))
        w, h = (math.ceil(one * grow / side) * side for one in (width, height))
    return w, h


def picture_tokens(width: int, height: int, settings: PictureTokens) -> int:
    """Tokens of one picture of `width` × `height` pixels, marks included. Raises ValueError as
    `resized` does."""
    w, h = resized(width, height, settings)
    return w * h // (settings.patch * settings.merge) ** 2 + MARKS
