"""Paths in settings: made absolute, and refused where no file system could have them.

Nothing here looks at a file: what is found at a path is the business of whoever reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

from zppo.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of a file's name, and of a whole path, on Linux and macOS (there 1,023 of a path)."""
SHOWN = 60
"""Characters of a refused path that messages repeat."""


def absolute(setting: str, path: str, base: Path, room: int = 0) -> Path:
    """`path` from `base` on; `~` is the home folder. Raises UserError, naming `setting`, for a path
    that cannot be, or that leaves less than `room` bytes for the files in the folder it names."""
    if not path:
        raise UserError(f"{setting} is ''; expected a path")
    try:
        full = (base / Path(path).expanduser()).absolute()
    except RuntimeError:  # from expanduser
        raise UserError(
            f"{setting} is {path[:SHOWN]!r}, whose home folder is not known; expected a whole path"
        ) from None
    if "\0" in path:
        raise UserError(f"{setting} is {path[:SHOWN]!r}; expected a path without NUL")
    for part in full.parts:
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise UserError(
                f"{setting}: the name {part[:SHOWN]!r}… in it has {len(os.fsencode(part))} bytes; "
                f"expected at most {LONGEST_NAME}"
            )
    if len(os.fsencode(full)) > LONGEST_PATH - room:
        raise UserError(
            f"{setting}: the path {str(full)[:SHOWN]!r}… has {len(os.fsencode(full))} bytes; "
            f"expected at most {LONGEST_PATH - room}"
        )
    return full


def absolute_use(setting: str, use: str, base: Path) -> str:
    """`./file.py:name` with an absolute path; any other name of an extension as it is."""
    file, colon, name = use.rpartition(":")
    return f"{absolute(setting, file, base)}:{name}" if colon and file.endswith(".py") else use
