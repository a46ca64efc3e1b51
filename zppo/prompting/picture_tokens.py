"""How many tokens a picture takes in a prompt of Qwen's vision models, from its size alone.

Their processor resizes a picture to multiples of patch · merge pixels on both sides, with an area
within bounds, and makes one token of each square of that size; a mark stands before and one behind
them. What is computed here is that resize, without a pixel of the picture.
"""

from __future__ import annotations

import math

from zppo.config.base import Config, Positive

MARKS = 2
"""`<|vision_start|>` and `<|vision_end|>`."""
MOST_ELONGATED = 200
"""Long side over short side; the processor refuses what is above."""


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


def resized(width: int, height: int, settings: PictureTokens) -> tuple[int, int]:
    """(width, height) in pixels after the processor's resize. Raises ValueError for a picture that
    is more than 200 times as long as it is wide."""
    if max(width, height) / min(width, height) > MOST_ELONGATED:
        raise ValueError(f"its sides are more than {MOST_ELONGATED} to 1")
    side = settings.patch * settings.merge
    w, h = round(width / side) * side, round(height / side) * side
    if w * h > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        w, h = (max(side, math.floor(one / shrink / side) * side) for one in (width, height))
    elif w * h < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        w, h = (math.ceil(one * grow / side) * side for one in (width, height))
    return w, h


def picture_tokens(width: int, height: int, settings: PictureTokens) -> int:
    """Tokens of one picture of `width` × `height` pixels, marks included. Raises ValueError as
    `resized` does."""
    w, h = resized(width, height, settings)
    return w * h // (settings.patch * settings.merge) ** 2 + MARKS
