"""Methods are values: which prompts a window has and which groups enter the loss. One short file
each.

A method never appears by name in the scheduler, the trainer or the actors. To add one, write a
module here that holds `METHOD = Method(...)` and name the module in the topology.
"""

from __future__ import annotations

import importlib
import pkgutil

from zppo.algorithm.methods.base import Method
from zppo.errors import UserError, nearest

__all__ = ["Method", "get_method", "method_names"]


def method_names() -> list[str]:
    """Names of all methods: the modules of this package that are not private and not `base`."""
    return sorted(
        m.name
        for m in pkgutil.iter_modules(__path__)
        if m.name != "base" and not m.name.startswith("_")
    )


def get_method(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest name if there is none."""
    if name not in method_names():
        raise UserError(f"method.name: there is no method {name!r}{nearest(name, method_names())}")
    method = importlib.import_module(f"{__name__}.{name}").METHOD
    assert isinstance(method, Method)
    return method
