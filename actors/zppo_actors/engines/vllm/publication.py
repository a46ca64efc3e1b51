"""The check of a published policy before vLLM hears of it: against its digests, and against the
model that is served.

vLLM keeps other tensors than the trainer (projections are fused, weights may be packed), so a
publication is compared with the *layout* of the Hugging Face model: names, shapes and dtypes as
`state_dict` has them, tied tensors under their first name alone. The invariant: what `verify` lets
pass covers the model exactly, and `FileIdentity` tells a worker whether it opens the file that was
verified.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from zppo.errors import UserError, first_line
from zppo.training.loading import FAULTS, model_class, read_config
from zppo_actors.weights import PublicationRefused, shared_memory
from zppo_protocol.values import PolicyManifest

PREPARING, READY = "preparing", "ready"
"""What a worker says of an update; anything else is the reason why it cannot be loaded."""


class FileIdentity(Struct, frozen=True):
    """Which file was verified; a file that is put in its place, or a write to it, gives another
    one."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Update(Struct, frozen=True):
    """What the actor tells every worker: a manifest, and the file that it was verified to
    describe."""

    manifest: PolicyManifest
    file: FileIdentity

    def to_payload(self) -> dict[str, str]:
        """As vLLM's own messages carry it."""
        return {"prepare": msgspec.json.encode(self).decode()}


class Layout(Struct, frozen=True):
    """Shape of every tensor of a model by name, and the other names of tied ones with the name they
    come under. `dtype`: of the tensors, but for those that transformers keeps in float32 (the
    biases of some routers)."""

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    dtype: torch.dtype


def read_layout(folder: str, dtype: str, where: str) -> Layout:
    """The layout of the model in `folder`, without its weights. Raises UserError if it is no causal
    language model."""
    config = read_config(folder, where)
    opened_by = model_class(config, folder, where)
    try:
        with torch.device("meta"):
            model = opened_by.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=False
            )
    except FAULTS as error:
        reason = first_line(error)
        raise UserError(f"{where}: {folder!r} is no causal language model ({reason})") from error
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    # Tied parameters are one object here; on the meta device they share no memory to be recognised
    # by.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (kept := first.setdefault(id(tensor), name)) == name:
            shapes[name] = tuple(tensor.shape)
        else:
            aliases[name] = kept
    return Layout(shapes, aliases, getattr(torch, dtype))


def verify(layout: Layout, manifest: PolicyManifest) -> Update:
    """Check all of a publication; nothing is loaded.

    Raises PublicationRefused for a file that is torn or replaced, a digest that is wrong, a name
    too many or too few, or another shape or dtype.
    """
    before = _identity(manifest)
    published = shared_memory.open_policy(manifest)
    if _identity(manifest) != before:
        raise PublicationRefused(manifest, "the file changed while it was read")
    for name, tensor in published.items():
        if reason := _misfit(layout, name, tensor):
            raise PublicationRefused(manifest, reason)
    if missing := [name for name in layout.shapes if name not in published]:
        raise PublicationRefused(
            manifest, f"tensor {missing[0]!r} is missing ({len(missing)} in all)"
        )
    return Update(manifest, before)


def _identity(manifest: PolicyManifest) -> FileIdentity:
    try:
        return FileIdentity.of(Path(manifest.path).stat())
    except OSError as error:
        raise PublicationRefused(manifest, error) from error


def _misfit(layout: Layout, name: str, tensor: Tensor) -> str | None:
    """Why this tensor cannot be loaded, or None if it can."""
    if name in layout.aliases:
        return f"tensor {name!r} is tied to {layout.aliases[name]!r} and comes under that name"
    if name not in layout.shapes:
        return f"the model has no tensor {name!r}"
    if tuple(tensor.shape) != layout.shapes[name]:
        return (
            f"tensor {name!r} has shape {list(tensor.shape)}, the model wants "
            f"{list(layout.shapes[name])}"
        )
    if tensor.is_floating_point() and tensor.dtype not in (layout.dtype, torch.float32):
        return f"tensor {name!r} has dtype {tensor.dtype}, the model wants {layout.dtype}"
    return None
