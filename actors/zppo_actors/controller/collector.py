"""Python's collector of cycles, as the controller needs it."""

from __future__ import annotations

import gc

COLLECTED = 20_000
"""Objects made before it looks for cycles."""


def collect_less() -> None:
    """Spare the collector of cycles what is there for good: questions and settings. What comes and
    goes later, groups with their grades, has hardly any cycles, so that the collector need not look
    every 700 objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED, 20, 20)
