"""The credit book against a naive model: an actor is never sent more than it asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zppo_protocol.credits import MAX_CREDITS, CreditBook
from zppo_protocol.errors import ProtocolError

ACTORS = ["rollout-0", "grader-0", "trainer"]
COUNTS = st.integers(-2, 40) | st.sampled_from([MAX_CREDITS, MAX_CREDITS + 1])


class CreditMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.book = CreditBook()
        self.granted: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()

    @rule(actor=st.sampled_from(ACTORS), count=COUNTS)
    def grant(self, actor: str, count: int) -> None:
        if 0 <= count <= MAX_CREDITS - self.granted[actor] + self.spent[actor]:
            self.book.grant(actor, count)
            self.granted[actor] += count
            return
        with pytest.raises(ProtocolError, match=f"{actor} may hold 0 to {MAX_CREDITS} credits"):
            self.book.grant(actor, count)

    @rule(actor=st.sampled_from(ACTORS), count=COUNTS)
    def spend(self, actor: str, count: int) -> None:
        if 0 <= count <= self.granted[actor] - self.spent[actor]:
            self.book.spend(actor, count)
            self.spent[actor] += count
            return
        with pytest.raises(ProtocolError, match=f"credits, not {count}"):
            self.book.spend(actor, count)

    @rule(actor=st.sampled_from(ACTORS))
    def forget(self, actor: str) -> None:
        self.book.forget(actor)
        del self.granted[actor], self.spent[actor]

    @invariant()
    def never_more_than_asked_for(self) -> None:
        for actor in ACTORS:
            assert self.book.available(actor) == self.granted[actor] - self.spent[actor] >= 0


TestCredits = pytest.mark.slow(CreditMachine.TestCase)


def test_credits_of_a_dead_actor_are_gone() -> None:
    book = CreditBook()
    book.grant("rollout-0", 8)
    book.forget("rollout-0")
    with pytest.raises(ProtocolError, match="rollout-0 has 0 credits, not 1"):
        book.spend("rollout-0", 1)
