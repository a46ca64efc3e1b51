"""The arguments of an engine, from plain data to its own Struct; needs no engine, so a plan can be checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from zppo.errors import UserError, nearest

Arguments = TypeVar("Arguments", bound=Struct)


def convert_arguments(given: Mapping[str, Any], arguments: type[Arguments], where: str) -> Arguments:
    """Convert `engine_args` of the section `where`. Raises UserError with the path, and the nearest name if unknown."""
    where = f"{where}.engine_args"
    known = arguments.__struct_fields__
    for name in given:
        if name not in known:
            raise UserError(f"{where}.{name}: unknown engine argument{nearest(name, known)}")
    try:
        return msgspec.convert(dict(given), arguments)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        raise UserError(f"{where}{'.' + name if name else ''}: {reason[0].lower()}{reason[1:]}") from error
