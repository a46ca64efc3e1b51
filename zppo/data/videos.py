"""Videos as they enter a corpus: sampled once, when the data is made, to a few still frames with
their times.

Nothing that trains or samples ever opens a video: engines, trainer and report read the frames, as
pictures, so that all of them see the same pixels at the same times, whatever decoder is installed.
PyAV decodes (the extra `video`); frames are taken evenly from the first to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from PIL import Image

from zppo.data.pictures import MAX_PIXELS, PixelBounds
from zppo.errors import UserError, first_line

MAX_DECODED = 1_000_000
"""Frames of a video that is read at all: over nine hours at 30 a second."""
NEEDS_AV = (
    "videos are read with PyAV, which is not installed; install it with: pip install zppo[video]"
)


class Frame(Struct, frozen=True):
    """One frame, RGB, and when it is shown, in seconds from the first one."""

    picture: Image.Image
    second: float


def sample_frames(file: Path, count: int, bounds: PixelBounds) -> list[Frame]:
    """At most `count` frames of a video, evenly from the first to the last, turned as the file says
    and scaled into the bounds; fewer where it has fewer. Raises UserError for a file that is no
    whole video."""
    try:
        import av
    except ImportError:
        raise UserError(NEEDS_AV) from None
    try:
        times = [second for second, _ in _decoded(av, file)]
        wanted = _evenly(times, count)
        return [
            Frame(_upright(frame, bounds), second - times[0])
            for index, (second, frame) in enumerate(_decoded(av, file))
            if index in wanted
        ]
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UserError(f"the video {str(file)!r} cannot be read ({first_line(error)})") from None


def _decoded(av: Any, file: Path) -> Iterator[tuple[float, Any]]:
    """(time in seconds, frame) of the first video stream; frames without a rising time are left
    out."""
    with av.open(str(file), mode="r") as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"its frames have more than {MAX_PIXELS} pixels")
        last = -1.0
        for number, frame in enumerate(container.decode(stream)):
            if number >= MAX_DECODED:
                raise ValueError(f"it has more than {MAX_DECODED} frames")
            if frame.time is not None and frame.time > last:
                last = float(frame.time)
                yield last, frame
        if last < 0:
            raise ValueError("no frame of it can be decoded")


def _evenly(times: list[float], count: int) -> set[int]:
    """Indices of at most `count` frames, evenly from the first to the last by their number."""
    return set(np.linspace(0, len(times) - 1, min(count, len(times))).round().astype(int).tolist())


def _upright(frame: Any, bounds: PixelBounds) -> Image.Image:
    picture: Image.Image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0) or 0) % 360
    if turned:
        picture = picture.rotate(turned, expand=True)
    size = bounds.apply(*picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)
