"""Which model lies in a folder, told without reading its weights whole.

What is hashed: the small files whole (configuration, tokenizer, templates), and of each safetensors
file its size, its header and the first bytes of its tensors. A model that was trained further, or
another one of the same shape, differs in nearly every tensor, so it shows; a single number changed
in the middle of a tensor does not. Times are left out, because a copy of a model is the same model.
Some thousand short reads at the most, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from zppo.plan.model_folder import MAX_HEADER_BYTES

WHOLE = (".json", ".jinja", ".model")
ALSO_WHOLE = ("vocab.txt", "merges.txt")
WEIGHTS = ".safetensors"
TENSORS, TENSOR_BYTES = 1024, 256
"""So many tensors of a file are looked at, spread evenly, and so much of each."""


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of names and contents as the module says. Raises OSError if a file cannot be
    read."""
    sha = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in WHOLE or path.name in ALSO_WHOLE:
            _feed(sha, path.name.encode(), path.read_bytes())
        elif path.suffix == WEIGHTS:
            _feed(sha, path.name.encode(), _weights_sample(path))
    return sha.hexdigest()


def _feed(sha: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)


def _weights_sample(path: Path) -> bytes:
    """Size, header and the first bytes of tensors."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER_BYTES))
        starts = [8 + length + start for start in _tensor_starts(header)]
        parts = [_at(file, start) for start in starts[:: max(1, -(-len(starts) // TENSORS))]]
    return size.to_bytes(8, "little") + header + b"".join(parts)


def _tensor_starts(header: bytes) -> list[int]:
    """Offsets of all tensors behind the header; none if it is no header (the loader says so)."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, dict[str, object]])
        offsets = [entry["data_offsets"] for key, entry in entries.items() if key != "__metadata__"]
        return sorted(msgspec.convert(offset, tuple[int, int])[0] for offset in offsets)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return []


def _at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.read(TENSOR_BYTES)
