"""The prompt replay buffer B: hard questions wait here until the student masters them.

It keeps questions (text and media references), never responses. The rules of Algorithm 1, all O(1)
per question:

- *admit* a question whose plain accuracy fell below τ; it joins the back of the FIFO order;
- *revisit* an entry that is still hard: it keeps its place in the order, its history grows;
- *graduate* (remove) an entry whose plain accuracy reached τ;
- *evict* the oldest entries while |B| > capacity;
- *draw* uniformly without replacement, never an entry that is in flight in some window.

Invariant: an entry is either available or in flight, and every entry has one place in the FIFO
order. An entry may be evicted while in flight; when it comes back still hard it is admitted as a
new entry.
"""

from __future__ import annotations

import random
from collections import OrderedDict

from msgspec import Struct, field

from zppo.data.question import Question


class Visited(Struct, frozen=True):
    """One visit of an entry: the training step and the plain accuracy r̄ seen there."""

    step: int
    accuracy: float


class Entry(Struct, kw_only=True):
    """A question in the buffer. `entry_accuracy` is r̄ at admission; `visits` starts with the
    admission itself."""

    question: Question
    entry_accuracy: float
    visits: list[Visited] = field(default_factory=list)


class BufferState(Struct, kw_only=True):
    """Serialised form: entries in FIFO order, and the order of the available ones, so that draws
    repeat."""

    entries: list[Entry]
    available: list[str]


class ReplayBuffer:
    """See the module docstring. Question ids are the keys."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"the replay buffer needs a capacity of at least 1, got {capacity}")
        self.capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._available: list[str] = []
        self._position: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._entries

    def __getitem__(self, question_id: str) -> Entry:
        return self._entries[question_id]

    def entries(self) -> list[Entry]:
        """All entries, oldest first."""
        return list(self._entries.values())

    @property
    def available(self) -> int:
        """How many entries can be drawn now."""
        return len(self._available)

    def draw(self, count: int, rng: random.Random) -> list[Question]:
        """Take up to `count` available questions uniformly without replacement; they are in flight
        until seen again."""
        drawn = []
        for _ in range(min(count, len(self._available))):
            question_id = self._available[rng.randrange(len(self._available))]
            self._hide(question_id)
            drawn.append(self._entries[question_id].question)
        return drawn

    def hold(self, question_id: str) -> None:
        """Mark an entry in flight because its question is visited as new (a later pass over the
        corpus)."""
        if question_id in self._position:
            self._hide(question_id)

    def admit(self, question: Question, accuracy: float, step: int) -> Entry:
        """Append a hard question at the back of the order."""
        if question.id in self._entries:
            raise ValueError(f"question {question.id!r} is in the buffer already")
        entry = Entry(question=question, entry_accuracy=accuracy, visits=[Visited(step, accuracy)])
        self._entries[question.id] = entry
        self._show(question.id)
        return entry

    def revisit(self, question_id: str, accuracy: float, step: int) -> Entry:
        """Record that an entry was seen and is still hard; it keeps its place and becomes available
        again."""
        entry = self._entries[question_id]
        entry.visits.append(Visited(step, accuracy))
        self._show(question_id)
        return entry

    def put_back(self, question_id: str) -> Entry:
        """An entry was visited and nothing came of it; it becomes available again."""
        self._show(question_id)
        return self._entries[question_id]

    def graduate(self, question_id: str, accuracy: float, step: int) -> Entry:
        """Remove a mastered entry and return it with its whole history."""
        entry = self._remove(question_id)
        entry.visits.append(Visited(step, accuracy))
        return entry

    def evict(self) -> list[Entry]:
        """Remove the oldest entries while |B| > capacity, and return them."""
        evicted = []
        while len(self._entries) > self.capacity:
            evicted.append(self._remove(next(iter(self._entries))))
        return evicted

    def state(self) -> BufferState:
        return BufferState(entries=self.entries(), available=list(self._available))

    def restore(self, state: BufferState) -> None:
        """Take over the content of a saved buffer; the capacity stays, and the next `evict` applies
        it."""
        self._entries = OrderedDict((entry.question.id, entry) for entry in state.entries)
        self._available, self._position = [], {}
        for question_id in state.available:
            self._show(question_id)

    def _show(self, question_id: str) -> None:
        if question_id not in self._position:
            self._position[question_id] = len(self._available)
            self._available.append(question_id)

    def _hide(self, question_id: str) -> None:
        """Swap with the last and pop, so that removal from the draw list is O(1)."""
        position = self._position.pop(question_id)
        last = self._available.pop()
        if last != question_id:
            self._available[position] = last
            self._position[last] = position

    def _remove(self, question_id: str) -> Entry:
        if question_id in self._position:
            self._hide(question_id)
        return self._entries.pop(question_id)
