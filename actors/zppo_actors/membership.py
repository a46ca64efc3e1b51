"""What every actor owes the controller whatever its role: a heartbeat at the pace that it is told,
and leaving when it is told to.

Invariant: an actor that was told to leave does nothing more, whatever it is in the middle of,
because the word comes as an exception. No socket and no clock here, so that an asyncio loop and a
blocking one use the same; a time is an argument, in seconds of any one clock.
"""

from __future__ import annotations

import logging

from zppo.errors import EXIT_FAILED
from zppo_protocol.messages import AnyMessage, Forgotten, Goodbye, Rejected, Shutdown, Welcome

GREETING_BEATS = 10
"""Heartbeats between two greetings."""
LONGEST_REASON = 2000
"""Characters of a reason that are worth sending; an exception may hold a whole tensor."""

log = logging.getLogger("zppo.membership")


class Leave(Exception):
    """Ends the work of an actor; carries the exit code and, where something is wrong, the last
    words."""

    def __init__(self, exit_code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.reason = reason

    def goodbye(self) -> Goodbye:
        """The last word to the controller. What is wrong goes to the actor's own log too."""
        if self.reason:
            log.error("leaving: %s", self.reason)
        return Goodbye(reason=self.reason[:LONGEST_REASON])


class Membership:
    """`seconds` between two heartbeats, from the topology until the controller's Welcome says
    otherwise."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.welcomed = False
        self._greeted = float("-inf")
        self._due = float("-inf")

    def obey(self, message: AnyMessage) -> None:
        """Take a message that is about membership and not about work.

        Raises Leave on Shutdown, on Rejected, and on Forgotten, which a role that can begin anew
        takes itself. Any other message belongs to another role; it is logged and ignored.
        """
        match message:
            case Welcome():
                self.welcomed = True
                self.seconds = message.heartbeat_seconds
            case Shutdown():
                log.info("told to leave: %s", message.reason)
                raise Leave(0)
            case Forgotten():
                raise Leave(EXIT_FAILED, "the controller has forgotten this process")
            case Rejected():
                raise Leave(
                    EXIT_FAILED,
                    f"the controller refuses to work with this process: {message.reason}",
                )
            case _:
                log.warning("ignored a %s, which is not for this actor", type(message).__name__)

    def greets_again(self, now: float) -> bool:
        """Whether a Forgotten that came at `now` is to be answered by another Hello. Each message
        that was on its way brings one; they are answered once in `GREETING_BEATS`."""
        if now < self._greeted + GREETING_BEATS * self.seconds:
            return False
        log.warning("the controller has forgotten this process, which greets it again")
        self._greeted = now
        return True

    def begins_anew(self, message: AnyMessage) -> bool:
        """Whether this message is a Welcome after the first: the controller counts no credits of
        this process, and has given what it holds to others."""
        return isinstance(message, Welcome) and self.welcomed

    def rest(self, now: float) -> float:
        """Seconds until the next heartbeat is due."""
        return max(0.0, self._due - now)

    def due(self, now: float) -> bool:
        """Whether a heartbeat is due; if so it counts as sent, and the next is due `seconds` after
        `now`."""
        if now < self._due:
            return False
        self._due = now + self.seconds
        return True
