"""What users bring of their own, by import path or entry point: found, checked and identified."""

from zppo.extensions.find import (
    GROUPS,
    Extension,
    Kind,
    check_call,
    identity_of,
    load,
    names_of,
)

__all__ = [
    "GROUPS",
    "Extension",
    "Kind",
    "check_call",
    "identity_of",
    "load",
    "names_of",
]
