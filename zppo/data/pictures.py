"""Pictures by reference: what makes a file one that can be trained on, and the one way in which
engines, trainer and report read it.

The invariants: a file that `refer` takes has a known format, a sane size and all of its data, so
that it can be read later, on another process, in the middle of a run; sizes are read from the
header first, so a decompression bomb is refused before a pixel of it is decoded. And what
`read_picture` gives is what was referred to, bit for bit, or an error that names the file: bytes
are read once, compared by their SHA-256, and those same bytes are decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from msgspec import Struct
from PIL import Image, ImageOps, UnidentifiedImageError

from zppo_protocol.values import PictureReference

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_ELONGATED = 200
"""Long side over short side; processors of vision models refuse what is above."""
MODES = frozenset(
    {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
    | {"I;16", "I;16L", "I;16B"}
)
"""Kinds of pixels, in Pillow's names, that have a plain meaning as red, green and blue."""
_PLAIN_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Values of the EXIF tag above by which width and height change places."""


class PictureError(Exception):
    """Why a picture cannot be had, as a whole sentence that names its file."""


class PixelBounds(Struct, frozen=True):
    """Least and largest area, in pixels, that models are shown (`data.min_pixels` and
    `data.max_pixels`); None: no bound."""

    least: int | None = None
    most: int | None = None

    def apply(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of the picture scaled into the bounds, its shape kept as well
        as whole pixels can."""
        area = width * height
        if self.most is not None and area > self.most:
            scale = math.sqrt(self.most / area)
            return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        if self.least is not None and area < self.least:
            scale = math.sqrt(self.least / area)
            return math.ceil(width * scale), math.ceil(height * scale)
        return width, height


NO_BOUNDS = PixelBounds()


def refer(file: Path, bounds: PixelBounds = NO_BOUNDS) -> PictureReference:
    """The reference to a picture file. Raises ValueError with the end of a sentence that says what
    is wrong with the file, as `picture_problem` does."""
    try:
        problem = size_problem(file)
        content = file.read_bytes() if problem is None else b""
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if problem is not None:
        raise ValueError(problem)
    return refer_content(content, str(file), bounds)


def refer_content(content: bytes, path: str, bounds: PixelBounds = NO_BOUNDS) -> PictureReference:
    """The reference to a picture of these bytes that lies at `path`. Raises ValueError as `refer`
    does."""
    problem = picture_problem(content)
    if problem is not None:
        raise ValueError(problem)
    _, *own = picture_header(content)
    width, height = bounds.apply(*own)
    problem = _shape_problem(*own) or _shape_problem(width, height) or _size_problem(width, height)
    if problem is not None:
        raise ValueError(problem)
    sha256 = hashlib.sha256(content).hexdigest()
    return PictureReference(path=path, sha256=sha256, width=width, height=height)


def read_picture(reference: PictureReference) -> Image.Image:
    """The picture, RGB, of `reference.width` × `reference.height` pixels. Raises PictureError if
    the file is not what was referred to.

    It is turned as its EXIF data says, transparent parts are shown on white, 16 bits a channel
    become 8, and another size is reached by bicubic resampling.
    """
    return decode(read_bytes(reference), reference)


def read_bytes(reference: PictureReference) -> bytes:
    """The bytes of the file. Raises PictureError if they are not those that were referred to."""
    file = Path(reference.path)
    try:
        problem = size_problem(file)
        content = b"" if problem else file.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise PictureError(f"the picture {reference.path!r} {problem}")
    found = hashlib.sha256(content).hexdigest()
    if found != reference.sha256:
        raise PictureError(
            f"the picture {reference.path!r} has changed since the data was read (its SHA-256 is "
            f"{found[:12]}…, and was {reference.sha256[:12]}…); put the old file back, or begin a "
            "new run"
        )
    return content


def plain_bytes(reference: PictureReference) -> tuple[str, bytes]:
    """(media type, bytes) of a file in which anybody sees what `read_picture` gives: the file
    itself where it is plain, else a PNG. Raises PictureError as `read_picture` does."""
    content = read_bytes(reference)
    picture = decode(content, reference)
    with _bombs_unsaid(), _opened(content) as image:
        plain = (
            image.format in _PLAIN_FORMATS
            and image.mode in ("RGB", "L")
            and image.size == picture.size
            and image.getexif().get(_ORIENTATION, 1) == 1
            and "transparency" not in image.info
        )
        if plain:
            return Image.MIME[str(image.format)], content
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "image/png", file.getvalue()


def decode(content: bytes, reference: PictureReference) -> Image.Image:
    """As `read_picture`, from bytes that were checked already."""
    size = (reference.width, reference.height)
    problem = _size_problem(*size) or picture_problem(content)
    if problem:
        raise PictureError(f"the picture {reference.path!r} {problem}")
    try:
        with _bombs_unsaid(), _opened(content) as image:
            picture = _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a PNG's checksums may be right and its pixels be missing
        raise PictureError(f"the picture {reference.path!r} is unreadable ({error})") from error
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def picture_problem(picture: Path | bytes) -> str | None:
    """Say what is wrong with a picture, a file or its bytes, as the end of a sentence; None if it
    is readable."""
    problem = size_problem(picture)
    if problem:
        return problem
    try:
        with _bombs_unsaid():
            return _check(picture)
    except UnidentifiedImageError:
        return f"is not a picture; expected one of {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        return f"has more than {MAX_PIXELS} pixels"
    except Exception as error:  # Pillow's decoders raise many kinds on broken data
        return f"is unreadable ({error})"


def size_problem(picture: Path | bytes) -> str | None:
    """Say why a picture need not even be read, or None."""
    if isinstance(picture, Path) and not picture.is_file():
        return "does not exist"
    size = picture.stat().st_size if isinstance(picture, Path) else len(picture)
    return f"is larger than {MAX_BYTES // 2**20} MiB" if size > MAX_BYTES else None


def picture_header(picture: bytes) -> tuple[str, int, int]:
    """(format, width, height) in pixels, of a picture without a problem, turned as its EXIF data
    says."""
    with _bombs_unsaid(), _opened(picture) as image:
        if image.format == "TIFF":  # which is turned as it is read, its size already before
            image.load()
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        width, height = (image.height, image.width) if turned else image.size
        return str(image.format), width, height


@contextmanager
def _bombs_unsaid() -> Iterator[None]:
    """Pillow warns of large pictures; we refuse those that are too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _opened(picture: Path | bytes) -> Image.Image:
    file = picture if isinstance(picture, Path) else io.BytesIO(picture)
    return Image.open(file, formats=FORMATS)


def _check(picture: Path | bytes) -> str | None:
    with _opened(picture) as image:
        problem = _size_problem(image.width, image.height) or _kind_problem(image)
        if problem:
            return problem
        image.verify()
    with _opened(picture) as image:
        if image.format != "PNG":  # of the others verify() sees nothing that is missing
            image.draft("L", (1, 1))  # a JPEG, at 1/8 scale, cheaply
            image.load()
    return None


def _size_problem(width: int, height: int) -> str | None:
    return f"has more than {MAX_PIXELS} pixels" if width * height > MAX_PIXELS else None


def _shape_problem(width: int, height: int) -> str | None:
    if max(width, height) > MOST_ELONGATED * min(width, height):
        return (
            f"has {width} × {height} pixels; expected sides of at most {MOST_ELONGATED} to 1, "
            "because models are shown no thinner pictures"
        )
    return None


def _kind_problem(image: Image.Image) -> str | None:
    # A photograph's file may hold further pictures (MPO); its first is the one that is meant.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "has several frames; expected a still picture, or a video (docs/pictures.md)"
    if image.mode not in MODES:
        return f"has pixels of the kind {image.mode!r}; expected grey or colour of 8 or 16 bits"
    return None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")
