"""Twins of the messages for a look at their fields: the same types and bounds, and no checks of
arrays.

msgspec checks the types of fields where a value is read, not where it is built. The sender asks the
twin, which costs no copy of any text and looks at no array: those were checked when the value was
built. Invariant: what a message's own type refuses of a field that is no array, its twin refuses
with the same words.
"""

from __future__ import annotations

import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Struct

ArrayReference = tuple[str, list[int], int]
"""Where an array lies in the payload: dtype, shape, offset."""


def shape_of(kind: Any) -> Any:
    """The type `kind` with every Struct in it replaced by its twin, and every array by its
    reference."""
    if kind is np.ndarray:
        return ArrayReference
    if isinstance(kind, type) and issubclass(kind, Struct):
        return _twin(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is None or origin is Literal:
        return kind
    if origin is Annotated:
        return Annotated[(shape_of(arguments[0]), *kind.__metadata__)]
    parts = tuple(map(shape_of, arguments))
    return Union[parts] if origin in (Union, types.UnionType) else origin[parts]  # noqa: UP007


@functools.cache
def _twin(kind: type[Struct]) -> type[Struct]:
    config, hints = kind.__struct_config__, get_type_hints(kind, include_extras=True)
    return msgspec.defstruct(
        kind.__name__,
        [(name, shape_of(hints[name]), None) for name in kind.__struct_fields__],
        tag_field=config.tag_field,
        tag=config.tag,
        forbid_unknown_fields=True,
    )
