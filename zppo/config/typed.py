"""What is typed on the command line as if it were an option, and is a setting."""

from __future__ import annotations

from zppo.config.counterparts import hint_for, setting_called
from zppo.config.load import setting_names


def setting_typed(name: str) -> str | None:
    """What to say about the name of an option or argument that a command does not have, if it is a
    setting of ours or of another tool; else None."""
    called = setting_called(name)
    names = list(setting_names())
    ours = [path for path in names if path == name] or ([called] if called else [])
    ours += [path for path in names if path.endswith(f".{name}")]
    if ours:
        return f"; settings are changed with --set {ours[0]}=…"
    return hint_for(name)
