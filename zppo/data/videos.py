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
WHOLE = 0.95
"""A file that holds less than this share of the frames that its header says, or of the seconds less
one, is torn: headers are written before the end is known, and last frames may have no length."""
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
    out. Raises ValueError for a file that ends before it says, or of which many frames were left
    out, once all that is there was given."""
    with av.open(str(file), mode="r") as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"its frames have more than {MAX_PIXELS} pixels")
        last, decoded, given, end = -1.0, 0, 0, _End()
        for packet in container.demux():
            end.pass_by(packet, stream)
            for frame in packet.decode() if packet.stream_index == stream.index else []:
                decoded += 1
                if frame.time is not None and frame.time > last:
                    last, given = float(frame.time), given + 1
                    yield last, frame
        if last < 0:
            raise ValueError("no frame of it can be decoded")
        if given < WHOLE * decoded:
            raise ValueError(
                f"{decoded - given} of its {decoded} frames are not later than those before them"
            )
        end.check(stream.frames, (container.duration or 0) / av.time_base)


class _End:
    """Where a file ends: decoders take the end of a torn one for the end of the film."""

    def __init__(self) -> None:
        self._frames, self._second = 0, 0.0

    def pass_by(self, packet: Any, stream: Any) -> None:
        """Of any stream, because the sound may be longer than the film. Raises ValueError for more
        frames of `stream` than are taken."""
        if packet.stream_index == stream.index and packet.size:
            self._frames += 1
        if self._frames > MAX_DECODED:
            raise ValueError(f"it has more than {MAX_DECODED} frames")
        if packet.pts is not None and packet.time_base is not None:
            ends = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self._second = max(self._second, ends)

    def check(self, frames: int, seconds: float) -> None:
        """Raise ValueError unless it reaches what its header says, 0 where that says nothing."""
        if self._frames < WHOLE * frames:
            raise ValueError(f"it ends after {self._frames} of {frames} frames")
        if self._second < WHOLE * seconds - 1.0:
            raise ValueError(f"it ends after {self._second:.1f} of {seconds:.1f} seconds")


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
