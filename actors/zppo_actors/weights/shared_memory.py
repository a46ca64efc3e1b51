"""Policy weights in shared memory: one file per version, published by the trainer and read by every
engine.

How a weight file is laid out says `zppo_actors.weights.layout`; names, dtypes, shapes and digests
travel in the `PolicyManifest`. The invariant: a file under its final name is whole (it is written
aside and renamed) and does not change while anybody maps it (`zppo_actors.weights.recycling`), and
an engine verifies everything before it touches its first parameter, so a bad publication leaves the
old weights serving.

The publisher alone looks for values that are not finite, because there a fault arises, and once:
the digest is of the very bytes that it has looked at, so who finds the digest right need not look
again.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from zppo.errors import FULL
from zppo.records.atomic_file import written_whole
from zppo_actors.weights import NotFinite, PublicationRefused
from zppo_actors.weights.layout import (
    ALIGNMENT,
    ITEM_BYTES,
    file_size,
    weight_path,
    whole_digest,
)
from zppo_actors.weights.recycling import begun, no_room, opened, set_aside, written
from zppo_protocol.values import PolicyManifest, TensorEntry

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
BLOCK = 1 << 20
"""Bytes that are written, looked at and taken a digest of in turn: they stay in the cache of one
core."""
INFINITY_BITS: dict[torch.dtype, tuple[str, str, int]] = {
    torch.float32: ("i4", "u4", 0x7F800000),
    torch.bfloat16: ("i2", "u2", 0x7F80),
    torch.float16: ("i2", "u2", 0x7C00),
}
"""Signed whole numbers of a float's size, unsigned ones, and the bits of infinity."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Pairs = list[tuple[Tensor, Tensor]]
"""(parameter of the model, published tensor) of the same shape and dtype."""


def publish(
    tensors: Mapping[str, Tensor], version: int, folder: Path, dtype: torch.dtype | None = None
) -> PolicyManifest:
    """Write `tensors` (a state dict, any device) as policy `version` into `folder` and describe
    them.

    Tied tensors are written once, under their first name. `dtype` casts floating tensors on the
    way, for a trainer that keeps wider masters. Raises OSError if the folder is full, NotFinite for
    a value that is NaN or infinite as it would be written, TypeError for an odd dtype; nothing is
    left behind.
    """
    return publish_each(untied(tensors), version, folder, dtype)


def publish_each(
    tensors: Iterable[tuple[str, Tensor]],
    version: int,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> PolicyManifest:
    """The same for tensors that come one at a time, none of them twice, such as those that several
    ranks gather."""
    path = weight_path(folder, version)
    try:
        with written_whole(path, begun=begun) as file:
            # One tensor after the other, so that the host never holds a second model.
            entries = [_append(file, name, _plain(tensor, dtype)) for name, tensor in tensors]
            _pad(file)
            file.truncate()  # an earlier version on these pages may have been longer
            written(file)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_room(folder, f"policy version {version}", error) from error
    return PolicyManifest(
        version=version, path=str(path), tensors=entries, digest=whole_digest(entries)
    )


def remove(folder: Path, version: int) -> None:
    """Give the file of `version` up to the next one that is published; engines that still map it
    keep what they map. Silent if it is gone."""
    set_aside(weight_path(folder, version))


def untied(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors without those that share all their memory with an earlier one."""
    seen: set[tuple[object, ...]] = set()
    unique = []
    for name, tensor in tensors.items():
        if (key := _identity(name, tensor)) not in seen:
            seen.add(key)
            unique.append((name, tensor))
    return unique


def is_finite(block: memoryview, dtype: torch.dtype) -> bool:
    """Whether these bytes of a tensor, at least one element, hold no NaN and no infinity, exactly;
    whole numbers never do.

    What is not finite has all exponent bits set, so as whole numbers such values lie above all
    others: among the positive ones where the sign bit counts as a sign, among the negative ones
    where it counts as the highest bit.
    """
    if dtype not in INFINITY_BITS:
        return True
    signed, unsigned, infinity = INFINITY_BITS[dtype]
    if np.maximum.reduce(np.frombuffer(block, signed)) >= infinity:
        return False
    negative = infinity | 1 << 8 * dtype.itemsize - 1
    return bool(np.maximum.reduce(np.frombuffer(block, unsigned)) < negative)


def open_policy(manifest: PolicyManifest) -> dict[str, Tensor]:
    """Map the file of `manifest` and return its tensors by name (CPU, no copy, private to this
    process).

    Raises PublicationRefused unless size, bounds, dtypes and every digest are as the manifest says.
    """
    with _refusals(manifest):
        size = file_size(manifest)
        with opened(Path(manifest.path)) as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise ValueError(f"the file has {found} bytes where the manifest needs {size}")
            # ACCESS_COPY gives writable pages, which torch wants; they are private, so nobody else
            # sees a write.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
        return {entry.name: _tensor_at(memory, entry) for entry in manifest.tensors}


def match(model: nn.Module, manifest: PolicyManifest) -> Pairs:
    """Verify the whole publication against `model` and pair its tensors with the model's; nothing
    is written.

    Raises PublicationRefused for a name too many or too few, another shape or dtype, and as
    `open_policy`.
    """
    published = open_policy(manifest)
    with _refusals(manifest):
        slots = _slots_by_name(model)
        pairs = [(_slot(slots, name), tensor) for name, tensor in published.items()]
        for (slot, tensor), name in zip(pairs, published, strict=True):
            _check_fit(name, slot, tensor)
        _check_cover(untied(model.state_dict()), pairs)
    return pairs


@torch.no_grad()
def copy(pairs: Pairs) -> None:
    """Copy verified tensors into the model in place, each onto its own device."""
    for slot, tensor in pairs:
        slot.copy_(tensor)


def load_into(model: nn.Module, manifest: PolicyManifest) -> str:
    """`match` then `copy`; returns the digest of what was loaded. Raises PublicationRefused, with
    the old weights in place."""
    copy(match(model, manifest))
    return manifest.digest


# ---- writing -------------------------------------------------------------------------------------


def _identity(name: str, tensor: Tensor) -> tuple[object, ...]:
    # Empty tensors have no memory to share; a view of another shape is another tensor.
    if tensor.numel() == 0:
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", cast).contiguous()


def _append(file: BinaryIO, name: str, tensor: Tensor) -> TensorEntry:
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"tensor {name!r} has dtype {tensor.dtype}; weight files hold {', '.join(DTYPES)}"
        )
    # As bytes, because numpy has no bfloat16; flat first, because a scalar has no view as bytes.
    raw = (
        memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if tensor.numel()
        else memoryview(b"")
    )
    start, digest = _pad(file), xxhash.xxh3_128()
    for block in _blocks(raw):
        file.write(block)
        if not is_finite(block, tensor.dtype):
            raise NotFinite(name)
        digest.update(block)
    return TensorEntry(
        name=name,
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=list(tensor.shape),
        start=start,
        size=raw.nbytes,
        digest=digest.hexdigest(),
    )


def _blocks(raw: memoryview) -> Iterator[memoryview]:
    """All of `raw`, in pieces of which each is in the cache when it is read again."""
    return (raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK))


def _pad(file: BinaryIO) -> int:
    position = file.tell()
    file.write(b"\0" * (-position % ALIGNMENT))
    return file.tell()


# ---- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals(manifest: PolicyManifest) -> Iterator[None]:
    """Turn what can go wrong with a file into the one error of this room."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PublicationRefused(manifest, error) from error


def _tensor_at(memory: mmap.mmap | bytes, entry: TensorEntry) -> Tensor:
    with memoryview(memory) as whole, whole[entry.start : entry.start + entry.size] as raw:
        digest = xxhash.xxh3_128_hexdigest(raw)
    if digest != entry.digest:
        raise ValueError(
            f"tensor {entry.name!r} has digest {digest} where the manifest says {entry.digest}"
        )
    count, dtype = math.prod(entry.shape), DTYPES[entry.dtype]
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


# ---- fitting -------------------------------------------------------------------------------------


def _slots_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every name of the state dict, tied ones too, so that a publication may use either name of a
    tied pair."""
    return dict(model.state_dict())


def _slot(slots: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in slots:
        raise ValueError(f"the model has no tensor {name!r}")
    return slots[name]


def _check_fit(name: str, slot: Tensor, tensor: Tensor) -> None:
    if slot.shape != tensor.shape:
        raise ValueError(
            f"tensor {name!r} has shape {list(tensor.shape)}, the model wants {list(slot.shape)}"
        )
    if slot.dtype != tensor.dtype:
        raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, the model wants {slot.dtype}")


def _check_cover(wanted: list[tuple[str, Tensor]], pairs: Pairs) -> None:
    covered = {_identity("", slot) for slot, _ in pairs if slot.numel()}
    missing = [
        name for name, slot in wanted if slot.numel() and _identity(name, slot) not in covered
    ]
    if missing:
        raise ValueError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
