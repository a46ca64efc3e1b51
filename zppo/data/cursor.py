"""The data cursor: every question of the corpus is handed out exactly once per pass, in a seeded
order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from msgspec import Struct, field

from zppo.data.corpus import shuffled
from zppo.data.question import Question


class CursorState(Struct, kw_only=True):
    """Places in the order over all passes: the next one to hand out, and those put back for
    later."""

    position: int = 0
    deferred: list[int] = field(default_factory=list)


class CorpusCursor:
    def __init__(
        self, questions: Sequence[Question], seed: int, epochs: int, state: CursorState
    ) -> None:
        self._questions = questions
        self._seed = seed
        self._end = epochs * len(questions)
        self._orders: dict[int, list[int]] = {}
        self._position = state.position
        self._deferred = list(state.deferred)

    @property
    def left(self) -> int:
        """How many questions are still to be handed out."""
        return self._end - self._position + len(self._deferred)

    def windows_left(self, per_window: int) -> int:
        """How many more windows the corpus fills; the last one may be smaller."""
        return math.ceil(self.left / per_window)

    def take(self, count: int, in_flight: set[str]) -> list[tuple[Question, int]]:
        """The next `count` questions, each with its pass; fewer only at the end of the last pass.

        A question that is in flight in another window, or twice in this one, is put back for a
        later window. Returns an empty list, and keeps everything, when the corpus has run dry but
        for questions in flight.
        """
        taken: dict[str, int] = {}
        waiting, self._deferred = deque(self._deferred), []
        blocked = False
        while len(taken) < count and (waiting or self._position < self._end):
            place = waiting.popleft() if waiting else self._advance()
            question_id = self._at(place)[0].id
            blocked = blocked or question_id in in_flight
            if question_id in in_flight or question_id in taken:
                self._deferred.append(place)
            else:
                taken[question_id] = place
        self._deferred.extend(waiting)
        if blocked and len(taken) < count:
            self._deferred = [*taken.values(), *self._deferred]
            return []
        return [self._at(place) for place in taken.values()]

    def state(self) -> CursorState:
        return CursorState(position=self._position, deferred=list(self._deferred))

    def _advance(self) -> int:
        self._position += 1
        return self._position - 1

    def _at(self, place: int) -> tuple[Question, int]:
        """The question at a place of the order over all passes, and its pass."""
        epoch, index = divmod(place, len(self._questions))
        if epoch not in self._orders:
            self._orders[epoch] = shuffled(len(self._questions), self._seed, epoch).tolist()
        return self._questions[self._orders[epoch][index]], epoch
