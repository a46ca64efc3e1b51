"""Where the bytes of a policy lie: one file per version, tensors end to end, each starting at a
multiple of 64 bytes. What a manifest says of itself is checked here, without torch and without the
file, because hosts that only hand weights on need neither."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import xxhash

from zppo_protocol.values import PolicyManifest, TensorEntry

ALIGNMENT = 64
ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
"""The dtypes of weight files and the bytes of one element."""


def weight_path(folder: Path, version: int) -> Path:
    """The file of policy `version` in the runtime folder."""
    return folder / f"policy-{version}.bin"


def whole_digest(entries: Iterable[TensorEntry]) -> str:
    """Digest over names, dtypes, shapes and tensor digests; it says that two processes hold the
    same weights."""
    lines = [[entry.name, entry.dtype, entry.shape, entry.digest] for entry in entries]
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(lines))


def file_size(manifest: PolicyManifest) -> int:
    """The bytes of the file that `manifest` describes. Raises ValueError for a manifest that
    contradicts itself."""
    if not manifest.tensors:
        raise ValueError("it holds no tensors")
    end, names = 0, set()
    for entry in manifest.tensors:
        _check_entry(entry, end)
        if entry.name in names:
            raise ValueError(f"tensor {entry.name!r} comes twice")
        names.add(entry.name)
        end = entry.start + entry.size
    if (digest := whole_digest(manifest.tensors)) != manifest.digest:
        raise ValueError(f"the manifest's digest is {manifest.digest}, its tensors give {digest}")
    return end + -end % ALIGNMENT


def _check_entry(entry: TensorEntry, previous_end: int) -> None:
    if entry.dtype not in ITEM_BYTES:
        raise ValueError(
            f"tensor {entry.name!r} has dtype {entry.dtype!r}; allowed are {', '.join(ITEM_BYTES)}"
        )
    if entry.size != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
        raise ValueError(
            f"tensor {entry.name!r} has {entry.size} bytes, which is not {entry.dtype}{entry.shape}"
        )
    if entry.start % ALIGNMENT or entry.start < previous_end:
        raise ValueError(
            f"tensor {entry.name!r} starts at {entry.start}, not at a free multiple of {ALIGNMENT}"
        )
