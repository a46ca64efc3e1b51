"""Data set folders: as `save_to_disk` of the `datasets` library writes them, or as a data set of
the Hub is laid out.

A folder may hold several splits. One of them is named like a folder inside: `gsm8k/main/train`,
whether `train` is a folder of its own (`save_to_disk`) or only the beginning of file names
(`train-00000-of-00002.parquet`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from zppo.data.sources.base import Source
from zppo.data.sources.built import MANIFEST, open_built
from zppo.data.sources.layouts import Wanted
from zppo.data.sources.tables import SUFFIXES, open_tables
from zppo.errors import UserError, nearest

SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
UNSPLIT = ""

Splits = dict[str, list[Path]]


def open_folder(folder: Path, wanted: Wanted) -> Source:
    """Open a folder that holds one split. Raises UserError, naming the splits if there are
    several."""
    if (folder / MANIFEST).is_file():
        return open_built(folder, wanted)
    splits = find_splits(folder)
    if len(splits) != 1:
        names = ", ".join(sorted(name or "(files without a split's name)" for name in splits))
        example = folder / next((name for name in sorted(splits) if name), "SPLIT")
        raise UserError(
            f"{folder}: holds several splits: {names}; name one of them, for example {example}"
        )
    ((split, files),) = splits.items()
    return open_tables(folder, split or folder.name, files, wanted)


def open_split(path: Path, wanted: Wanted) -> Source | None:
    """Open `FOLDER/SPLIT` where SPLIT is the beginning of file names; None if FOLDER has no such
    splits at all."""
    splits = find_splits(path.parent) if _has_tables(path.parent) else {}
    names = [name for name in splits if name]
    if not names:
        return None
    if path.name not in names:
        raise UserError(
            f"{path}: the data set has no split {path.name!r}{nearest(path.name, names)}"
        )
    return open_tables(path, path.name, splits[path.name], wanted)


def find_splits(folder: Path) -> Splits:
    """The files of each split, in order of their names. Raises UserError if there are none."""
    if (folder / SAVED_SPLITS).is_file():
        names = _json(folder / SAVED_SPLITS).get("splits")
        return {name: _saved(folder / name) for name in _file_names(names, folder / SAVED_SPLITS)}
    if (folder / SAVED).is_file():
        return {UNSPLIT: _saved(folder)}
    splits: Splits = {}
    for file in _tables(folder):
        match = SHARD.fullmatch(file.stem)
        splits.setdefault(match["split"] if match else UNSPLIT, []).append(file)
    if not splits:
        inner = sorted(one.name for one in folder.iterdir() if one.is_dir() and _has_tables(one))
        there = f"; the folder {inner[0]!r} in it has some" if inner else ""
        raise UserError(
            f"{folder}: holds no Parquet or Arrow files; expected a data set as save_to_disk or "
            f"the Hub lays it out{there}"
        )
    return splits


def _has_tables(folder: Path) -> bool:
    return (folder / SAVED_SPLITS).is_file() or bool(_tables(folder))


def _tables(folder: Path) -> list[Path]:
    """Tables of the folder, or of its folder `data`, where the Hub often keeps them."""
    for place in (folder, folder / "data"):
        files = sorted(
            file for file in place.glob("*") if file.suffix in SUFFIXES and file.is_file()
        )
        if files:
            return files
    return []


def _saved(folder: Path) -> list[Path]:
    """The files that `state.json` names, in its order."""
    entries = _json(folder / SAVED).get("_data_files")
    names = (
        [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    files = [folder / name for name in _file_names(names, folder / SAVED)]
    missing = [file for file in files if not file.is_file() or file.suffix not in SUFFIXES]
    if missing or not files:
        what = f"{missing[0].name} is missing" if missing else "it names no files"
        raise UserError(f"{folder / SAVED}: {what}; expected a data set as save_to_disk writes it")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); expected a file as save_to_disk writes it"
        ) from None


def _file_names(names: object, file: Path) -> list[str]:
    """Plain names only: a data set may not point outside its folder."""
    if not isinstance(names, list) or not all(
        isinstance(name, str) and Path(name).name == name for name in names
    ):
        raise UserError(f"{file}: expected a list of plain file names, got {str(names)[:80]}")
    return names
