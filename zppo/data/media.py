"""Pictures as rows hold them, and as files.

A row names a picture by its path, or holds it: tables of the Hub have `{bytes, path}` in their
cells. What travels is a reference to a file, so a picture inside a table becomes one, named by its
SHA-256, in the folder `media` of the folder that paths are read from. Which file that is follows
from the bytes alone, so everybody who reads the table refers to the same one, and only who starts
a run or an evaluation writes it: aside first, so what has its name is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from zppo.data.pictures import PixelBounds, picture_header, refer, refer_content
from zppo.data.text import RowError, clean
from zppo.errors import UserError
from zppo_protocol.values import PictureReference

MEDIA = "media"
MAX_PATH = 512
SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tiff",
}
"""Format -> the suffix of its files."""
_KEYS = ("bytes", "path")
_NO_PICTURES = ({"bytes": None, "path": None}, {"image": None})
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:[^,]*,", re.IGNORECASE)


class Cell(Struct, frozen=True):
    """A picture in a row: what is in it, or where it lies. `path` beside `content` is a name."""

    content: bytes | None = None
    path: str | None = None


def picture_entries(value: object) -> list[Any]:
    """The pictures of a row, as its column holds them: one or a list. Tables of the Hub fill the
    place of one that is not there with nulls."""
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if entry is not None and entry not in _NO_PICTURES]


def cell_of(entry: object) -> Cell | None:
    """What an entry of a column of pictures says: a path, bytes, `{bytes, path}` with one of them,
    or `{image: path}` as verl has it; None where it is something else."""
    if isinstance(entry, bytes):
        return Cell(entry)
    if isinstance(entry, dict) and set(entry) == {"image"}:
        entry = entry["image"]
    if isinstance(entry, str):
        return Cell(None, entry)
    content, path = (entry.get(key) if isinstance(entry, dict) else None for key in _KEYS)
    named = path if isinstance(path, str) else None
    if isinstance(content, bytes):
        return Cell(content, named)
    return Cell(None, named) if content is None and named is not None else None


def is_address(path: str) -> bool:
    """Whether it is an address (`https://`, `file://`, `data:`) and not the path of a file."""
    return _ADDRESS.match(path) is not None


def plain_format(kind: str) -> str:
    """The format of a file as it is named: an MPO is what cameras make of JPEG."""
    return "JPEG" if kind == "MPO" else kind


def media_file(sha256: str, kind: str) -> str:
    """Where a folder `media` has a picture of this SHA-256 and format (`plain_format`)."""
    return f"{sha256[:2]}/{sha256}{SUFFIXES[kind]}"


def keep(file: Path, content: bytes, sha256: str, aside: Path) -> None:
    """Write a picture, by way of the file `aside`, unless it is there whole. Raises OSError."""
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_bytes(content)
        aside.replace(file)
    except BaseException:  # Ctrl-C, too
        aside.unlink(missing_ok=True)
        raise


class PictureReader:
    """Makes references of the pictures of one source, whose paths are read from `folder`."""

    def __init__(
        self, folder: Path, bounds: PixelBounds, *, named_by_content: bool, unpack: bool
    ) -> None:
        """`named_by_content`: files have their SHA-256 as a name. `unpack`: write those that lie
        inside a table; else only say where they would be."""
        self._folder = folder
        self._bounds = bounds
        self._named_by_content = named_by_content
        self._unpack = unpack
        self._kept: set[str] = set()

    def read(self, cell: Cell, name: str) -> PictureReference:
        """`name` is what its column is called. Raises RowError; UserError where a file cannot be
        written."""
        if cell.content is not None:
            return self._inside(cell.content, name)
        assert cell.path is not None, "a cell has one of them"
        return self._at(cell.path)

    def _at(self, path: str) -> PictureReference:
        if is_address(path):
            raise RowError(
                f"image {path[:40]!r} is an address, and addresses are not read; save the picture "
                f"as a file in {str(self._folder)!r} and give its path"
            )
        full = self._named(Path(clean(path, "an image path")))
        try:
            real = full.resolve()
        except RuntimeError:  # how Python up to 3.12 says it
            raise RowError(f"image {path!r} is a link that leads to itself") from None
        if not real.is_relative_to(self._folder.resolve()):
            raise RowError(
                f"image {path!r} leads out of the folder {str(self._folder)!r}; expected a file in "
                "it, or that data.media_folder names a folder that holds it"
            )
        try:
            reference = refer(full, self._bounds)
        except ValueError as error:
            raise RowError(f"image {path!r} {error}") from None
        if self._named_by_content and reference.sha256 != full.stem:
            raise RowError(f"image {path!r} is not what its name, a SHA-256, says")
        return reference

    def _inside(self, content: bytes, name: str) -> PictureReference:
        try:
            seen = refer_content(content, MEDIA, self._bounds)
        except ValueError as error:
            raise RowError(f"a picture inside {name} {error}") from None
        kind = plain_format(picture_header(content)[0])
        file = self._named(Path(MEDIA) / media_file(seen.sha256, kind))
        if self._unpack and seen.sha256 not in self._kept:
            self._write(file, content, seen.sha256)
            self._kept.add(seen.sha256)
        return replace(seen, path=str(file))

    def _named(self, path: Path) -> Path:
        full = (self._folder / path).absolute()
        if len(str(full)) > MAX_PATH:
            raise RowError(f"image path {str(path)[:40]!r}… is longer than {MAX_PATH} characters")
        return full

    def _write(self, file: Path, content: bytes, sha256: str) -> None:
        # Two launches may read one table, perhaps on two hosts.
        aside = file.with_name(f".{sha256}-{os.urandom(8).hex()}")
        try:
            keep(file, content, sha256, aside)
        except OSError as error:
            raise UserError(
                f"{self._folder / MEDIA}: cannot be written ({error.strerror}), and the pictures "
                "inside the table become files there; make room for them, name another folder with "
                "data.media_folder, or copy the table to where there is room"
            ) from None
