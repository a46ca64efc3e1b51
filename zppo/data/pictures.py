"""Whether a picture file can be trusted to load later, on an engine host, in the middle of a run.

The invariant: a file that passes has a known format, a sane size and all of its data. Sizes are
read from the header first, so a decompression bomb is refused before a pixel of it is decoded.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def picture_problem(path: Path) -> str | None:
    """Say what is wrong with a picture as the end of a sentence, or None if it is readable."""
    if not path.is_file():
        return "does not exist"
    if path.stat().st_size > MAX_BYTES:
        return f"is larger than {MAX_BYTES // 2**20} MiB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _check(path)
    except UnidentifiedImageError:
        return f"is not a picture; expected one of {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        return f"has more than {MAX_PIXELS} pixels"
    except Exception as error:  # Pillow's decoders raise many kinds on broken data
        return f"is unreadable ({error})"


def _check(path: Path) -> str | None:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            return f"has more than {MAX_PIXELS} pixels"
        image.verify()
    with Image.open(path, formats=FORMATS) as image:
        if image.format == "JPEG":
            # verify() does not see a truncated JPEG; a decode at 1/8 scale does, cheaply.
            image.draft("L", (1, 1))
            image.load()
    return None
