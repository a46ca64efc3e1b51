"""How much of an engine's room sampled nothing (pure; a time is seconds of any one clock)."""

from __future__ import annotations


class Occupancy:
    """`room` sequences at once, none of them in hand at `now`. What is measured begins there, so it
    is made when the engine may be given work: what it waits for before is no fault of its tasks."""

    def __init__(self, room: int, now: float) -> None:
        self._room = room
        self._held = 0
        self._since = self._began = now
        self._used = 0.0
        """sequences × seconds"""

    def holds(self, sequences: int, now: float) -> None:
        """So many sequences are in hand from now on; more than fit wait."""
        self._used += self._held * (now - self._since)
        self._held, self._since = min(sequences, self._room), now

    def take_idle(self, now: float) -> float | None:
        """Share of room and time that was not used since this was asked last; None where no time
        has passed."""
        self.holds(self._held, now)
        whole = self._room * (now - self._began)
        used, self._used, self._began = self._used, 0.0, now
        return 1.0 - used / whole if whole > 0.0 else None
