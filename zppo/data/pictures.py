"""Whether a picture file can be trusted to load later, on an engine host, in the middle of a run.

The invariant: a file that passes has a known format, a sane size and all of its data. Sizes are
read from the header first, so a decompression bomb is refused before a pixel of it is decoded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def picture_problem(picture: Path | bytes) -> str | None:
    """Say what is wrong with a picture, a file or its bytes, as the end of a sentence; None if it
    is readable."""
    problem = size_problem(picture)
    if problem:
        return problem
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
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
    """(format, width, height) in pixels, of a picture without a problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with _opened(picture) as image:
            return str(image.format), image.width, image.height


def _opened(picture: Path | bytes) -> Image.Image:
    file = picture if isinstance(picture, Path) else io.BytesIO(picture)
    return Image.open(file, formats=FORMATS)


def _check(picture: Path | bytes) -> str | None:
    with _opened(picture) as image:
        if image.width * image.height > MAX_PIXELS:
            return f"has more than {MAX_PIXELS} pixels"
        image.verify()
    with _opened(picture) as image:
        # verify() sees only a truncated PNG; WebP is read whole when it is opened.
        if image.format not in ("PNG", "WEBP"):
            image.draft("L", (1, 1))  # a JPEG, at 1/8 scale, cheaply
            image.load()
    return None
