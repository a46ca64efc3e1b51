"""Picture files of many kinds, and references to them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from zppo.data.pictures import refer
from zppo_protocol.values import PictureReference


def turned(orientation: int) -> Image.Exif:
    """EXIF data that say how a picture is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def coloured(file: Path, colour: str, size: tuple[int, int] = (4, 4)) -> PictureReference:
    """A picture of one colour, and the reference to it."""
    Image.new("RGB", size, colour).save(file)
    return refer(file)
