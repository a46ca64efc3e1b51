"""What every section of the topology is made of: a strict Struct, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

Positive: TypeAlias = Annotated[int, Meta(ge=1)]
NonNegative: TypeAlias = Annotated[int, Meta(ge=0)]
Port: TypeAlias = Annotated[int, Meta(ge=1, le=65_535)]
MOST_PROCESSES = 10_000
"""Of one setting: a plan lists them all."""
Share: TypeAlias = Annotated[float, Meta(ge=0.0, le=1.0)]
PositiveFloat: TypeAlias = Annotated[float, Meta(gt=0.0, le=1e30)]
MOST_SECONDS = 1e9
"""Clocks and timers of the system take no more than some hundred years."""
Seconds: TypeAlias = Annotated[float, Meta(gt=0.0, le=MOST_SECONDS)]
"""A wait."""
MOST_THREADS = 1024
Threads: TypeAlias = Annotated[int, Meta(ge=1, le=MOST_THREADS)]
NonNegativeFloat: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e30)]


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections."""
