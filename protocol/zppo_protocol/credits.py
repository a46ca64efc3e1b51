"""Credits: the permission to send work that an actor has given and the controller has not used yet.

Invariant: an actor never has more work than it asked for. Whatever is spent was granted before, so
the number of units on their way to an actor, and with it every queue, is bounded by what the actor
itself chose.
"""

from __future__ import annotations

from zppo_protocol.errors import ProtocolError

MAX_CREDITS = 1_000_000


class CreditBook:
    """Available credits by actor. The unit is the actor's: sequences, questions or windows."""

    def __init__(self) -> None:
        self._available: dict[str, int] = {}

    def grant(self, actor: str, count: int) -> None:
        """Add what `actor` has asked for. Raises ProtocolError if it would then hold more than
        MAX_CREDITS."""
        total = self.available(actor) + count
        if count < 0 or total > MAX_CREDITS:
            raise ProtocolError(
                f"{actor} may hold 0 to {MAX_CREDITS} credits, {count} more would make {total}"
            )
        self._available[actor] = total

    def spend(self, actor: str, count: int) -> None:
        """Take `count` credits for work that is being sent. Raises ProtocolError, and takes none,
        if too few."""
        left = self.available(actor) - count
        if count < 0 or left < 0:
            raise ProtocolError(f"{actor} has {self.available(actor)} credits, not {count}")
        self._available[actor] = left

    def available(self, actor: str) -> int:
        return self._available.get(actor, 0)

    def forget(self, actor: str) -> None:
        """The actor is gone, and its permission with it."""
        self._available.pop(actor, None)
