"""What pages of runs, comparisons and suites share, without what draws figures: matplotlib takes a
second to import."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent
"""The folder of the style sheet."""


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
