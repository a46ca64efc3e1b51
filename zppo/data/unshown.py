"""Pictures and videos in columns that nobody reads.

Which columns hold what is recognised by name (`zppo.data.sources.layouts`), so a data set with
`picture` or `image_1` would be trained on as text alone, and nothing would fail. What is looked for
here are rows that show no picture and have one in another column, and rows with pictures in both
`images` and `image`, of which one is read, to say so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from zppo.data.media import MAX_PATH, is_address, picture_entries
from zppo.errors import count_of

_FILE = re.compile(
    r"[^\n]+\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|m4v|mov|mkv|webm|avi)", re.IGNORECASE
)
_CELL = frozenset({"bytes", "path"})
_VIDEO = frozenset({"frames", "seconds"})


def unshown_column(row: Mapping[str, Any], read: Collection[str]) -> str | None:
    """The first column of a row, but for those that are `read`, that holds a picture or video."""
    return next((name for name, value in row.items() if name not in read and _holds(value)), None)


def _holds(value: object) -> bool:
    """Whether it is a picture or video as data sets have them, or a list of them: the bytes or the
    path of a file, or frames with their times. Addresses of the net are not read, and no loss."""
    return any(map(_is_one, picture_entries(value)))


def _is_one(entry: object) -> bool:
    if isinstance(entry, dict) and set(entry) == {"image"}:
        entry = entry["image"]
    if isinstance(entry, str):
        named = len(entry) <= MAX_PATH and _FILE.fullmatch(entry) is not None
        return named and not is_address(entry)
    return isinstance(entry, dict) and (set(entry) == _CELL or set(entry) >= _VIDEO)


def unshown_texts(unshown: Mapping[str, int]) -> Iterator[str]:
    """That questions are asked without what a column holds. `unshown`: column -> how many."""
    for column, count in unshown.items():
        asked = count_of(count, "question is", "questions are")
        yield (
            f"{asked} asked without the picture or video of the column {column!r}; name it in "
            "data.fields (images or videos), or leave it out of the file"
        )
