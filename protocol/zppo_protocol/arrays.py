"""What any array inside a message is checked for: dtype, dimensions, ids, offsets.

On a short array the place of the smallest element costs half of a reduction, on a long one up to
three times as much; so both are used here. To find the place numpy copies an array that is
read-only, which costs more than to look at it; so arrays are looked at before they are made so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from zppo_protocol.errors import ProtocolError

INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
SHORT = 2**14
"""Elements."""
FEW = 64
"""Elements of which a list is faster than any reduction."""


def check_array(
    name: str,
    value: Any,
    dtype: np.dtype[Any],
    dimensions: int = 1,
    look: Callable[[str, np.ndarray], None] | None = None,
) -> None:
    """Raise ProtocolError unless `value` is a numpy array of exactly this dtype and number of
    dimensions, in which `look`, given its name and itself, finds nothing. From here on it is
    read-only, so that what was checked is what is sent."""
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{name} must be a numpy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise ProtocolError(f"{name} must be {dtype.name}, got {value.dtype.name}")
    if value.ndim != dimensions:
        raise ProtocolError(f"{name} must have {dimensions} dimension(s), got shape {value.shape}")
    if look is not None:
        look(name, value)
    value.setflags(False)  # by name it would take twice as long


def lowest(array: np.ndarray) -> Any:
    """The smallest element of an array that has one; NaN if there is any."""
    if array.size <= SHORT:
        return array.item(array.argmin())
    return np.minimum.reduce(array, axis=None)


def highest(array: np.ndarray) -> Any:
    """The largest element of an array that has one; NaN if there is any."""
    if array.size <= SHORT:
        return array.item(array.argmax())
    return np.maximum.reduce(array, axis=None)


def are_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    if array.size <= FEW:
        return all(map(math.isfinite, array.ravel().tolist()))
    return bool(np.isfinite(array).all())


def check_ids(name: str, ids: np.ndarray) -> None:
    """Raise ProtocolError for a negative id."""
    if ids.size and (least := lowest(ids)) < 0:
        raise ProtocolError(f"{name} must not be negative, got {least}")


def check_offsets(name: str, offsets: np.ndarray, end: int) -> None:
    """Raise ProtocolError unless `offsets` run from 0 to `end` without falling."""
    if not len(offsets):
        raise ProtocolError(f"{name} must run from 0 to {end}, got nothing")
    first, last = offsets.item(0), offsets.item(-1)
    if first != 0 or last != end:
        raise ProtocolError(f"{name} must run from 0 to {end}, got {first} to {last}")
    if _falls(offsets):
        raise ProtocolError(f"{name} must not fall")


def _falls(offsets: np.ndarray) -> bool:
    if len(offsets) <= FEW:
        numbers = offsets.tolist()
        return numbers != sorted(numbers)
    return bool(highest(offsets[1:] < offsets[:-1]))
