"""Where questions come from: files and folders by their kind, and procedural sources by their
prefix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zppo.config.topology import REASONING_GYM, is_procedural
from zppo.data.sources.base import OWN_COLUMNS, Columns, RawRow, Source
from zppo.data.sources.folders import open_folder, open_split
from zppo.data.sources.jsonl import open_jsonl
from zppo.data.sources.reasoning_gym import open_reasoning_gym
from zppo.data.sources.tables import open_table
from zppo.errors import UserError, nearest

__all__ = ["FILES", "OWN_COLUMNS", "READERS", "Columns", "RawRow", "Source", "open_source"]

FILES: dict[str, Callable[[Path, Columns], Source]] = {
    ".jsonl": open_jsonl,
    ".parquet": open_table,
    ".arrow": open_table,
}
"""File suffix -> reader."""
READERS: dict[str, Callable[[str], Source]] = {REASONING_GYM: open_reasoning_gym}
"""Prefix of a specification `PREFIX:…` -> its source, one for each of
`zppo.config.topology.PROCEDURAL`."""


def open_source(path: str, columns: Columns, base: Path) -> Source:
    """Open what `data.train` or `data.heldout` names; relative paths start at `base`. Raises
    UserError."""
    if is_procedural(path):
        return READERS[path.partition(":")[0]](path)
    full = base / path
    if os.path.isdir(full):
        return open_folder(full, columns)
    if not os.path.isfile(full):
        if os.path.exists(full):  # reading a named pipe would wait for ever
            raise UserError(
                f"{full}: is a named pipe, a socket or a device; expected a question file"
            )
        split = open_split(full, columns) if full.suffix not in FILES else None
        if split is not None:
            return split
        raise UserError(f"{full}: no such question file{_nearest_file(full)}")
    if full.suffix not in FILES:
        raise UserError(
            f"{full}: unknown kind of question file {full.suffix!r}{nearest(full.suffix, FILES)}"
        )
    return FILES[full.suffix](full, columns)


def _nearest_file(path: Path) -> str:
    siblings = (
        [p.name for p in path.parent.glob("*") if p.suffix in FILES]
        if os.path.isdir(path.parent)
        else []
    )
    return nearest(path.name, siblings) if siblings else ""
