"""numba where it is installed, plain Python where it is not; one place decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:
    numba = None

HAVE_NUMBA = numba is not None
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[_F], _F]:
    """Compile a function without the interpreter lock; without numba return it unchanged."""

    def decorate(function: _F) -> _F:
        if numba is None:
            return function
        return numba.njit(nogil=True, cache=True, **options)(function)

    return decorate
