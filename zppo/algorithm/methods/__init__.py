"""Methods are values: which prompts a window has and which groups enter the loss. One short file
each.

A method never appears by name in the scheduler, the trainer or the actors. To add one, write a
module here that holds `METHOD = Method(...)` and name the module in the topology; one of a user's
own is such a value in a file or package of theirs.
"""

from __future__ import annotations

import importlib
import pkgutil

from zppo import extensions
from zppo.algorithm.methods.base import Method
from zppo.algorithm.methods.check import check_method

__all__ = ["Method", "get_method", "method_names"]


def method_names() -> list[str]:
    """Names of the methods built in: the modules of this package that are not private and hold a
    method."""
    return sorted(
        m.name
        for m in pkgutil.iter_modules(__path__)
        if m.name not in ("base", "check") and not m.name.startswith("_")
    )


def get_method(name: str) -> Method:
    """The method of that name, built in or the user's own. Raises UserError with the nearest name
    if there is none."""
    if name not in method_names():
        return check_method(
            "method.name",
            name,
            extensions.load("method.name", name, "method", method_names()).value,
        )
    method = importlib.import_module(f"{__name__}.{name}").METHOD
    assert isinstance(method, Method)
    return method
