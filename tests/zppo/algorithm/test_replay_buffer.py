"""The replay buffer against a naive list model (Hypothesis state machine), and its edges."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zppo.algorithm.replay_buffer import BufferState, ReplayBuffer
from zppo.data.question import Question
from zppo_protocol import codec


def question(number: int) -> Question:
    return Question(id=f"q{number}", text=f"question {number}", answer="1")


def copy_of(state: BufferState, capacity: int = 5) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity)
    buffer.restore(state)
    return buffer


accuracies = st.sampled_from([0.0, 0.125, 0.25, 0.375])


class BufferMachine(RuleBasedStateMachine):
    """The model: a list of ids in FIFO order, a set in flight, and a dict of histories."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReplayBuffer(capacity=5)
        self.order: list[str] = []
        self.in_flight: set[str] = set()
        self.history: dict[str, list[float]] = {}
        self.step = 0

    @rule(number=st.integers(0, 12), accuracy=accuracies)
    def visit_a_hard_question(self, number: int, accuracy: float) -> None:
        self.step += 1
        new = question(number)
        if new.id in self.order:
            self.buffer.revisit(new.id, accuracy, self.step)
            self.in_flight.discard(new.id)
            self.history[new.id].append(accuracy)
        else:
            self.buffer.admit(new, accuracy, self.step)
            self.order.append(new.id)
            self.history[new.id] = [accuracy]

    @rule(count=st.integers(0, 8), seed=st.integers(0, 99))
    def draw(self, count: int, seed: int) -> None:
        free = [q for q in self.order if q not in self.in_flight]
        drawn = [q.id for q in self.buffer.draw(count, random.Random(seed))]
        assert len(drawn) == min(count, len(free))
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(free)
        self.in_flight |= set(drawn)

    @rule(data=st.data())
    @precondition(lambda self: self.order)
    def graduate(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.order))
        entry = self.buffer.graduate(chosen, 1.0, self.step)
        assert [v.accuracy for v in entry.visits] == [*self.history.pop(chosen), 1.0]
        assert entry.entry_accuracy == entry.visits[0].accuracy
        self.order.remove(chosen)
        self.in_flight.discard(chosen)

    @rule(data=st.data())
    @precondition(lambda self: self.order)
    def hold(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.order))
        self.buffer.hold(chosen)
        self.in_flight.add(chosen)

    @rule()
    def evict(self) -> None:
        gone = [e.question.id for e in self.buffer.evict()]
        expected = self.order[: max(0, len(self.order) - 5)]
        assert gone == expected
        self.order = self.order[len(expected) :]
        self.in_flight -= set(gone)

    @rule()
    def save_and_restore(self) -> None:
        data = codec.dumps(self.buffer.state())
        restored = copy_of(codec.loads(data, BufferState))
        assert [q.id for q in restored.draw(3, random.Random(1))] == [
            q.id for q in copy_of(self.buffer.state()).draw(3, random.Random(1))
        ]
        self.buffer = copy_of(codec.loads(data, BufferState))

    @invariant()
    def same_as_the_model(self) -> None:
        assert [e.question.id for e in self.buffer.entries()] == self.order
        assert len(self.buffer) == len(self.order)
        assert self.buffer.available == len(self.order) - len(self.in_flight)
        assert all((q in self.buffer) == (q in self.order) for q in (f"q{i}" for i in range(13)))


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestBuffer.pytestmark = [pytest.mark.slow]


def test_a_restored_buffer_draws_what_the_first_would_have_drawn() -> None:
    buffer = ReplayBuffer(8)
    for i in range(8):
        buffer.admit(question(i), 0.0, 0)
    for drawn in buffer.draw(4, random.Random(3)):
        buffer.revisit(drawn.id, 0.0, 1)  # the draw order is no longer the order of entry
    restored = copy_of(codec.loads(codec.dumps(buffer.state()), BufferState), 8)
    assert restored.draw(4, random.Random(4)) == buffer.draw(4, random.Random(4))


def test_a_smaller_capacity_takes_effect_after_a_restore() -> None:
    buffer = ReplayBuffer(8)
    for i in range(8):
        buffer.admit(question(i), 0.0, 0)
    restored = copy_of(buffer.state(), 3)
    assert [e.question.id for e in restored.evict()] == [f"q{i}" for i in range(5)]


def test_the_draw_is_uniform() -> None:
    buffer = ReplayBuffer(8)
    for i in range(8):
        buffer.admit(question(i), 0.0, 0)
    rng = random.Random(0)
    counts = Counter(q.id for _ in range(4000) for q in copy_of(buffer.state(), 8).draw(2, rng))
    expected = 4000 * 2 / 8
    chi_square = sum((counts[f"q{i}"] - expected) ** 2 / expected for i in range(8))
    assert chi_square < 24.3, "the 0.1 % point of chi-square with 7 degrees of freedom"


def test_an_entry_keeps_its_place_when_it_is_seen_and_stays_hard() -> None:
    buffer = ReplayBuffer(2)
    for i in range(2):
        buffer.admit(question(i), 0.0, 0)
    buffer.revisit("q0", 0.25, 1)
    buffer.admit(question(2), 0.0, 2)
    assert [e.question.id for e in buffer.evict()] == ["q0"]


def test_an_entry_evicted_in_flight_is_not_drawn_again() -> None:
    buffer = ReplayBuffer(1)
    buffer.admit(question(0), 0.0, 0)
    assert [q.id for q in buffer.draw(1, random.Random(0))] == ["q0"]
    buffer.admit(question(1), 0.0, 1)
    assert [e.question.id for e in buffer.evict()] == ["q0"]
    assert [q.id for q in buffer.draw(5, random.Random(0))] == ["q1"]


def test_admitting_twice_is_refused() -> None:
    buffer = ReplayBuffer(3)
    buffer.admit(question(0), 0.0, 0)
    with pytest.raises(ValueError, match="question 'q0' is in the buffer already"):
        buffer.admit(question(0), 0.0, 1)


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="needs a capacity of at least 1, got 0"):
        ReplayBuffer(0)
