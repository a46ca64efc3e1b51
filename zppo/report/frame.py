"""What pages of runs, comparisons and suites share, without what draws figures: matplotlib takes a
second to import."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_PER_CENT = re.compile(r"(?<=\d) %")
ASSETS = Path(__file__).parent
"""The folder of the style sheet."""


def environment(folder: Path) -> Environment:
    """The templates of a page: text is escaped, and a number and its per cent sign stay on one
    line."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _unbroken(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _PER_CENT.sub("\u00a0%", value)
    return value


def flatten(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The resolved topology as (path, value) lines."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, "–" if node is None else str(node)


def digest(text: str) -> str:
    """The content security policy's name for an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
