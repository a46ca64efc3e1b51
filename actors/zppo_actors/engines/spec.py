"""What an engine is built from, and the check of its arguments; needs no torch, so a plan can be checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from msgspec import Struct

from zppo.config import ModelConfig
from zppo.engine_arguments import convert_arguments

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
    return convert_arguments(spec.engine_args, arguments, spec.where)
