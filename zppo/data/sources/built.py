"""A corpus that `zppo build-data` made: rows, pictures whose files are named by the SHA-256 of what
is in them, and a manifest with the SHA-256 of the rows, which so covers the pictures as well.

Its rows name their graders, which are read unless `data.reward` says what a response earns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from zppo.data.sources.base import Source
from zppo.data.sources.jsonl import open_jsonl
from zppo.data.sources.layouts import Wanted
from zppo.errors import UserError, first_line

MANIFEST, ROWS = "corpus.json", "train.jsonl"


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a corpus is. It is written last: without it nothing is there."""

    recipe: str
    recipe_sha256: str
    prompt_sha256: str
    """of what prompts are measured by, templates and tokenizer; empty where the recipe has no
    limit"""
    rows: int
    pictures: int
    """files in `media`"""
    sha256: str
    """of the bytes of the rows, which hold the names of the pictures"""


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError for a damaged one."""
    file = folder / MANIFEST
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({first_line(error)}); expected a corpus as zppo build-data "
            "makes it"
        ) from None


def open_built(folder: Path, wanted: Wanted) -> Source:
    """Open a corpus. Raises UserError if its rows are not those that were built."""
    manifest, file = read_manifest(folder), folder / ROWS
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); expected the rows of the corpus"
        ) from None
    if found != manifest.sha256:
        raise UserError(
            f"{file}: has changed since the corpus was built (its SHA-256 is {found[:12]}…, "
            f"{MANIFEST} says {manifest.sha256[:12]}…); build it again, or name the file itself to "
            "read it as it is"
        )
    source = open_jsonl(file, wanted)
    names = {"grader": "grader"} | dict(source.columns.names)
    return replace(
        source,
        stem=folder.name,
        columns=replace(source.columns, names=names),
        named_by_content=True,
    )
