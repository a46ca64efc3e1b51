"""The help of each setting: the docstring under its field, read from the source of its Struct.

Python keeps no such docstrings, so the source is parsed; a Struct inherits the docstrings of the
fields that it inherits.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from msgspec import Struct
from msgspec import inspect as shape

from zppo.config.explain import choices


def setting_help(node: shape.Type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, help) of all settings below `node`, sections included, in their order.

    Raises KeyError for a field without a docstring.
    """
    for choice in choices(node):
        if isinstance(choice, shape.StructType):
            documented = field_docstrings(choice.cls)
            for field in choice.fields:
                yield f"{prefix}{field.name}", documented[field.name]
                yield from setting_help(field.type, f"{prefix}{field.name}.")


def field_docstrings(struct: type[Struct]) -> dict[str, str]:
    """Field -> the first paragraph of its docstring, as one line."""
    documented: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if issubclass(base, Struct):
            documented.update(_classes(base.__module__).get(base.__name__, {}))
    return documented


@functools.cache
def _classes(module: str) -> dict[str, dict[str, str]]:
    """Class -> its own documented fields, of a whole module."""
    if module.startswith("msgspec"):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_fields(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:], strict=False):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.partition("\n\n")[0].split())
