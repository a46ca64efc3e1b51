"""What any array inside a message is checked for: dtype, dimensions, ids, offsets.

Reductions are called as ufuncs: on a short array the method of the same name costs half as much
again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zppo_protocol.errors import ProtocolError


def check_array(name: str, value: Any, dtype: type[np.generic], dimensions: int = 1) -> None:
    """Raise ProtocolError unless `value` is a numpy array of exactly this dtype and number of
    dimensions. From here on it is read-only, so that what was checked is what is sent."""
    if not isinstance(value, np.ndarray):
        raise ProtocolError(f"{name} must be a numpy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise ProtocolError(f"{name} must be {np.dtype(dtype).name}, got {value.dtype.name}")
    if value.ndim != dimensions:
        raise ProtocolError(f"{name} must have {dimensions} dimension(s), got shape {value.shape}")
    value.flags.writeable = False


def check_ids(name: str, ids: np.ndarray) -> None:
    """Raise ProtocolError for a negative id."""
    if ids.size and (lowest := np.minimum.reduce(ids)) < 0:
        raise ProtocolError(f"{name} must not be negative, got {lowest}")


def check_offsets(name: str, offsets: np.ndarray, end: int) -> None:
    """Raise ProtocolError unless `offsets` run from 0 to `end` without falling."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
        found = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "nothing"
        raise ProtocolError(f"{name} must run from 0 to {end}, got {found}")
    if np.logical_or.reduce(offsets[1:] < offsets[:-1]):
        raise ProtocolError(f"{name} must not fall")
