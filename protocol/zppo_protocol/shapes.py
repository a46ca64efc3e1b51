"""Twins of the messages, which check the fields that are no arrays: the same types, bounds and
defaults, and no checks of arrays.

msgspec checks the types of fields where a value is read, not where it is built. The sender turns
its message into the twin, which copies no text and looks at no array: those were checked when the
value was built. Invariants: what a message's own type refuses of a field that is no array, its twin
refuses with the same words; and a twin is encoded as its message would be.
"""

from __future__ import annotations

import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct


def shape_of(kind: Any) -> Any:
    """The type `kind` with every Struct in it replaced by its twin."""
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
    fields = [
        (field.name, shape_of(hints[field.name]), _default(field))
        for field in msgspec.structs.fields(kind)
    ]
    return msgspec.defstruct(
        kind.__name__,
        fields,
        tag_field=config.tag_field,
        tag=config.tag,
        omit_defaults=config.omit_defaults,
        kw_only=True,
    )


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.field(default_factory=field.default_factory)
    return field.default
