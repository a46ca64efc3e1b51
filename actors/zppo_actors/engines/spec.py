"""What an engine is built from, and the check of its arguments; needs no torch, so a plan can be checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from zppo.config import ModelConfig
from zppo.errors import UserError, nearest

Arguments = TypeVar("Arguments", bound=Struct)


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine to build. `where` is the path of its section in the topology, for messages (`actors.rollout`)."""

    model: ModelConfig
    where: str
    model_where: str
    device: str = "cpu"
    threads: int | None = None
    engine_args: Mapping[str, Any] = {}


def read_arguments(spec: EngineSpec, arguments: type[Arguments]) -> Arguments:
    """Convert `spec.engine_args` into the engine's own Struct. Raises UserError with path and nearest name."""
    where = f"{spec.where}.engine_args"
    known = arguments.__struct_fields__
    for name in spec.engine_args:
        if name not in known:
            raise UserError(f"{where}.{name}: unknown engine argument{nearest(name, known)}")
    try:
        return msgspec.convert(dict(spec.engine_args), arguments)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        raise UserError(f"{where}{'.' + name if name else ''}: {reason[0].lower()}{reason[1:]}") from error
