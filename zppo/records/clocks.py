"""How the monotonic clocks of a run's hosts stand to each other, so that spans of all hosts have
their place on one timeline, whatever the wall clocks say: `timeline/clocks.json`.

A host says what its clock shows when it sends a report, the supervisor reads its own when that
comes; the least difference over all reports is that of the report that was fastest. So a host's
spans are late by the shortest time that a report took at most, and early by what the clocks have
drifted apart at most. Clocks order nothing in a run: this is for those who look at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from zppo.records.atomic_file import written_whole

CLOCKS = "clocks.json"
MOST_BOOTS = 1024
"""What hosts say is bounded; spans of further boots are placed by the wall clock."""
LEAST_SECONDS = 0.001
"""A smaller gain is not written."""


class Other(Struct, frozen=True):
    """The clock of another boot: that of `boot` showed `seconds` more at the same moment."""

    boot: str
    seconds: float


_DECODER = msgspec.json.Decoder(dict[str, Other])


class Clocks:
    """What is known, by boot. `own` is the boot of the supervisor's host."""

    def __init__(self, own: str, known: Mapping[str, Other]) -> None:
        self._own, self.known = own, dict(known)

    def hear(self, boot: str, theirs: float, ours: float) -> bool:
        """A clock showed `theirs` at the latest when ours showed `ours`, in seconds. Says whether
        more is known now."""
        seconds = ours - theirs
        if boot in ("", self._own) or (boot not in self.known and len(self.known) >= MOST_BOOTS):
            return False
        before = self.known.get(boot)
        known = before is not None and before.boot == self._own
        if before is not None and known and seconds > before.seconds - LEAST_SECONDS:
            return False
        self.known[boot] = Other(self._own, seconds)
        return True


def read_clocks(folder: Path) -> dict[str, Other]:
    """What was written into the folder of timelines; nothing where there is no such file, or none
    that can be read."""
    try:
        return _DECODER.decode((folder / CLOCKS).read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def write_clocks(folder: Path, known: Mapping[str, Other]) -> None:
    """Write it, whole or not at all."""
    folder.mkdir(exist_ok=True)
    with written_whole(folder / CLOCKS) as file:
        file.write(msgspec.json.encode(known))
