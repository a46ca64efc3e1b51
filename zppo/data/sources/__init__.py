"""Where questions come from: files and folders by their kind, procedural sources by their
prefix, and the user's own by an import path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from zppo.config.topology import REASONING_GYM, is_own_source, is_procedural
from zppo.data.sources.base import RawRow, Source
from zppo.data.sources.csv_file import open_csv
from zppo.data.sources.folders import open_folder, open_split
from zppo.data.sources.json_file import open_json
from zppo.data.sources.jsonl import open_jsonl
from zppo.data.sources.layouts import Wanted
from zppo.data.sources.own import open_own
from zppo.data.sources.reasoning_gym import open_reasoning_gym
from zppo.data.sources.streams import PACKED, kind_of_file
from zppo.data.sources.tables import open_table
from zppo.errors import UserError, nearest

__all__ = ["FILES", "READERS", "RawRow", "Source", "open_source"]

TABLES: dict[str, Callable[[Path, Wanted], Source]] = {
    ".parquet": open_table,
    ".arrow": open_table,
}
TEXTS: dict[str, Callable[[Path, Wanted], Source]] = {
    ".jsonl": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
}
FILES = {
    **TABLES,
    **TEXTS,
    **{f"{kind}{packed}": reader for kind, reader in TEXTS.items() for packed in PACKED},
}
"""File suffix -> reader."""
READERS: dict[str, Callable[[str], Source]] = {REASONING_GYM: open_reasoning_gym}
"""Prefix of a specification `PREFIX:…` -> its source, one for each of
`zppo.config.topology.PROCEDURAL`."""
_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def open_source(path: str, wanted: Wanted, base: Path) -> Source:
    """Open what `data.train` or `data.heldout` names; relative paths start at `base`. Raises
    UserError."""
    if is_procedural(path):
        return READERS[path.partition(":")[0]](path)
    if is_own_source(path):
        return open_own(path, wanted, base)
    full = base / path
    if os.path.isdir(full):
        return open_folder(full, wanted)
    suffix = _suffix(full)
    if not os.path.isfile(full):
        if os.path.exists(full):  # reading a named pipe would wait for ever
            raise UserError(
                f"{full}: is a named pipe, a socket or a device; expected a question file"
            )
        split = open_split(full, wanted) if suffix not in FILES else None
        if split is not None:
            return split
        raise UserError(f"{full}: no such question file{_nearest_file(full) or _hub(full)}")
    if suffix == ".py":
        raise UserError(f"{full}: is code; expected the name of its function too: {path}:name")
    if suffix not in FILES:
        raise UserError(f"{full}: unknown kind of question file {suffix!r}{nearest(suffix, FILES)}")
    return FILES[suffix](full, wanted)


def _suffix(file: Path) -> str:
    """What says how to read it: `.jsonl`, or `.jsonl.gz`."""
    return kind_of_file(file) + file.suffix if file.suffix in PACKED else file.suffix


def _nearest_file(path: Path) -> str:
    siblings = (
        [p.name for p in path.parent.glob("*") if _suffix(p) in FILES]
        if os.path.isdir(path.parent)
        else []
    )
    return nearest(path.name, siblings) if siblings else ""


def _hub(path: Path) -> str:
    """How to fetch a data set, where the path may be its name on the Hub: `OWNER/NAME`, perhaps at
    the end of an address."""
    owner, name = path.parts[-2:] if len(path.parts) > 2 else ("", "")
    address = next((i for i, part in enumerate(path.parts) if part in ("hf:", "https:")), None)
    usual = _HUB_PART.fullmatch(owner) and _HUB_PART.fullmatch(name)
    if not usual or os.path.isdir(path.parent) or _suffix(path) in FILES:
        return ""
    folder = path if address is None else Path(*path.parts[:address], owner, name)
    return (
        f"; if {owner}/{name} is a data set of the Hugging Face Hub, fetch it with: hf download "
        f"{owner}/{name} --repo-type dataset --local-dir {folder}, and name {folder}"
    )
