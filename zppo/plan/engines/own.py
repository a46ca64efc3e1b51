"""The arguments of our own engines, and the way from plain data to them; needs no engine, so any
plan can be checked.

Those of `openai` have more rules (`zppo.plan.engines.openai`), those of `vllm` are vLLM's own
(`zppo.plan.engines.vllm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from zppo.config.explain import explain
from zppo.errors import UserError, nearest

Arguments = TypeVar("Arguments", bound=Struct)
Sequences = Annotated[int, Meta(ge=1, le=65_536)]
DEFAULT_SEQUENCES = 64


class TransformersArguments(Struct, frozen=True, kw_only=True):
    """`engine_args` of the engine `transformers`. `max_length` null is all the context the model
    has."""

    max_sequences: Sequences = DEFAULT_SEQUENCES
    max_length: Annotated[int, Meta(ge=2)] | None = None


class SimulatedArguments(Struct, frozen=True, kw_only=True):
    """`engine_args` of the engine `simulated`; without a script every question has the default
    behaviour."""

    script: str | None = None
    max_sequences: Sequences = DEFAULT_SEQUENCES


def convert_arguments(
    given: Mapping[str, Any], arguments: type[Arguments], where: str
) -> Arguments:
    """Convert `engine_args` of the section `where`. Raises UserError with the path, and the nearest
    name if unknown."""
    where = f"{where}.engine_args"
    known = arguments.__struct_fields__
    for name in given:
        if name not in known:
            raise UserError(f"{where}.{name}: unknown engine argument{nearest(name, known)}")
    try:
        return msgspec.convert(dict(given), arguments)
    except msgspec.ValidationError as error:
        raise UserError(explain(str(error), given, arguments, prefix=where).sentence) from error
