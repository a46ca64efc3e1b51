"""What an engine is built from; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from zppo.config import ModelConfig


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine to build. `where` is the path of its section in the topology, for messages (`actors.rollout`)."""

    model: ModelConfig
    where: str
    model_where: str
    device: str = "cpu"
    threads: int | None = None
    engine_args: Mapping[str, Any] = {}
