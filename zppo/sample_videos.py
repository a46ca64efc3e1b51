"""`zppo sample-videos ROWS --out FOLDER`: the videos of a question file, sampled to frames once and
for all.

ROWS is a JSONL file whose column `videos` or `video` holds a path, or a list of paths,
relative to the file. FOLDER receives the same rows with the frames and times of each video in its
place (`videos`), the frames as PNG files, and copies of the pictures that `images` or `image`
names, all named by their content. It is whole or not there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zppo.config.options import positive
from zppo.data.media import (
    MEDIA,
    Cell,
    PictureReader,
    cell_of,
    is_address,
    media_file,
    picture_entries,
    plain_format,
)
from zppo.data.pictures import NO_BOUNDS, PictureError, PixelBounds, picture_header, read_bytes
from zppo.data.sources.layouts import picture_column
from zppo.data.text import RowError
from zppo.data.videos import sample_frames
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, count_of, run_command
from zppo_protocol.values import MAX_FRAMES

ROWS = "train.jsonl"
FILMS = ("videos", "video")
"""One of these columns holds the videos of a row."""


def main(argv: Sequence[str] | None = None) -> int:
    """Sample all videos. Returns 0, or 2 after a user error, which leaves nothing behind."""
    try:
        options = _parser().parse_args(argv)
        print(sample(options.rows, options.out, options.frames, options.max_pixels))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def sample(rows: Path, out: Path, frames: int, max_pixels: int | None) -> str:
    """Write the folder, and say what is in it. Raises UserError."""
    if out.exists():
        raise UserError(f"--out: {str(out)!r} exists already; name a new folder, or remove it")
    if frames > MAX_FRAMES:
        raise UserError(f"--frames is {frames}; expected at most {MAX_FRAMES}")
    aside = out.with_name(f".{out.name}.partial-{os.urandom(4).hex()}")  # two may be at work
    try:
        (aside / MEDIA).mkdir(parents=True)
        writer = _Writer(rows.parent, aside, frames, PixelBounds(most=max_pixels))
        lines = [writer.row(place, row) for place, row in _read(rows)]
        (aside / ROWS).write_text("".join(lines), encoding="utf-8")
        aside.rename(out)
    except OSError as error:
        raise UserError(f"--out: {str(out)!r} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    made = f"rows: {len(lines)}, videos: {writer.videos}, of at most {count_of(frames, 'frame')}"
    return f"wrote {out / ROWS}: {made}"


class _Writer:
    def __init__(self, base: Path, folder: Path, frames: int, bounds: PixelBounds) -> None:
        self._base, self._folder, self._frames, self._bounds = base, folder, frames, bounds
        self._reader = PictureReader(base, NO_BOUNDS, named_by_content=False, unpack=False)
        self.videos = 0

    def row(self, place: str, row: dict[str, Any]) -> str:
        filled = [name for name in FILMS if row.get(name)]
        if len(filled) > 1:
            raise UserError(f"{place}: has {' and '.join(filled)}; expected one of them")
        films = filled[0] if filled else FILMS[0]
        value = row.get(films)
        paths = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(
                f"{place}: {films} is {str(value)[:40]!r}; expected a path or a list of paths"
            )
        if paths:
            rest = {name: one for name, one in row.items() if name not in FILMS}
            row = {**rest, FILMS[0]: [self._video(place, path) for path in paths]}
        column = picture_column(row)
        cells = [cell_of(entry) for entry in picture_entries(row.get(column))]
        paths = [cell.path for cell in cells if cell is not None and cell.path is not None]
        if paths and len(paths) == len(cells):
            row = {**row, column: [self._copied(place, path) for path in paths]}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _video(self, place: str, path: str) -> dict[str, Any]:
        if is_address(path):
            raise UserError(
                f"{place}: the video {path[:40]!r} is an address, and addresses are not read; save "
                f"it as a file in {str(self._base)!r} and give its path"
            )
        try:
            sampled = sample_frames(self._base / path, self._frames, self._bounds)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        self.videos += 1
        return {
            "frames": [self._saved(one.picture) for one in sampled],
            "seconds": [round(one.second, 3) for one in sampled],
        }

    def _copied(self, place: str, path: str) -> str:
        """A picture of the row, which lies beside ROWS."""
        try:
            content = read_bytes(self._reader.read(Cell(None, path), "the images"))
        except (RowError, PictureError) as error:
            raise UserError(f"{place}: {error}") from None
        return self._put(content, plain_format(picture_header(content)[0]))

    def _saved(self, picture: Any) -> str:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return self._put(file.getvalue(), "PNG")

    def _put(self, content: bytes, kind: str) -> str:
        name = f"{MEDIA}/{media_file(hashlib.sha256(content).hexdigest(), kind)}"
        file = self._folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return name


def _read(rows: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of each line that is not blank."""
    try:
        text = rows.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"ROWS: {str(rows)!r} cannot be read ({error}); expected JSONL") from None
    # JSON holds other ends of lines; files that were joined keep their byte order marks.
    lines = (line.removeprefix("\ufeff") for line in text.split("\n"))
    return [
        (f"{rows}:{number}", _object(f"{rows}:{number}", line))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _object(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: is a {type(row).__name__}; expected an object")
    return row


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo sample-videos",
        description="Sample the videos of a question file to frames, once and for all.",
    )
    parser.add_argument("rows", type=Path, metavar="ROWS", help="JSONL with a column videos")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--frames", type=positive, default=8, metavar="N", help="at most so many of a video (8)"
    )
    parser.add_argument(
        "--max-pixels", type=positive, metavar="N", help="frames of more area are reduced to it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
