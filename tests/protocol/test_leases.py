"""The lease ledger against a naive model: answered at most once, never lost, never with two
holders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zppo_protocol.errors import ProtocolError
from zppo_protocol.leases import LeaseLedger

LEASE = 10.0
ACTORS = st.sampled_from(["rollout-0", "rollout-1", "teacher-0"])
INCARNATIONS = st.integers(0, 2)


class LeaseMachine(RuleBasedStateMachine):
    """Every task is in exactly one place: waiting to be issued, leased, answered, or given up."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: LeaseLedger[dict[str, int]] = LeaseLedger(LEASE)
        self.now = 0.0
        self.created = 0
        self.waiting: list[str] = []
        self.leased: dict[str, dict[str, Any]] = {}
        self.answered: set[str] = set()
        self.given_up: set[str] = set()
        self.tries: dict[str, int] = {}

    @rule()
    def new_task(self) -> None:
        self.waiting.append(f"task-{self.created}")
        self.created += 1

    @precondition(lambda self: self.waiting)
    @rule(actor=ACTORS, incarnation=INCARNATIONS)
    def issue(self, actor: str, incarnation: int) -> None:
        task = self.waiting.pop(0)
        payload = {"n": len(self.tries)}
        self.tries[task] = self.tries.get(task, 0) + 1
        lease = self.ledger.issue(task, actor, incarnation, self.now, payload)
        assert (lease.task_id, lease.attempt, lease.payload) == (task, self.tries[task], payload)
        self.leased[task] = {"holder": (actor, incarnation), "sign": self.now, "payload": payload}

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), actor=ACTORS)
    def second_issue_is_refused(self, data: st.DataObject, actor: str) -> None:
        task = data.draw(st.sampled_from(sorted(self.leased)))
        with pytest.raises(ProtocolError, match="already leased"):
            self.ledger.issue(task, actor, 0, self.now, {})

    @rule(actor=ACTORS, incarnation=INCARNATIONS)
    def progress(self, actor: str, incarnation: int) -> None:
        self.ledger.progress(actor, incarnation, self.now)
        for lease in self.leased.values():
            if lease["holder"] == (actor, incarnation):
                lease["sign"] = self.now

    @precondition(lambda self: self.created)
    @rule(data=st.data(), actor=ACTORS, incarnation=INCARNATIONS, honest=st.booleans())
    def answer(self, data: st.DataObject, actor: str, incarnation: int, honest: bool) -> None:
        """Any actor answers any task ever made: late, twice, as an old incarnation, or as it
        should."""
        task = f"task-{data.draw(st.integers(0, self.created - 1))}"
        lease = self.leased.get(task)
        speaker = lease["holder"] if honest and lease else (actor, incarnation)
        payload = self.ledger.accept(task, *speaker)
        if lease is not None and lease["holder"] == speaker:
            assert payload is lease["payload"] and task not in self.answered
            self.answered.add(task)
            del self.leased[task], self.tries[task]
        else:
            assert payload is None

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), actor=ACTORS, incarnation=INCARNATIONS, honest=st.booleans())
    def failure(self, data: st.DataObject, actor: str, incarnation: int, honest: bool) -> None:
        task = data.draw(st.sampled_from(sorted(self.leased)))
        holder = self.leased[task]["holder"]
        speaker = holder if honest else (actor, incarnation)
        lease = self.ledger.release(task, *speaker)
        assert (lease is not None) == (holder == speaker)
        if lease is not None:
            self._take_back([lease], [task])

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 9.999, 10.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        over = [task for task, lease in self.leased.items() if self.now - lease["sign"] >= LEASE]
        self._take_back(self.ledger.expired(self.now), over)

    @rule(actor=ACTORS)
    def actor_dies(self, actor: str) -> None:
        held = [task for task, lease in self.leased.items() if lease["holder"][0] == actor]
        assert self.ledger.held_by(actor) == held
        self._take_back(self.ledger.release_actor(actor), held)

    @precondition(lambda self: self.leased or self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted([*self.leased, *self.waiting])))
        self.ledger.drop(task)
        self.given_up.add(task)
        self.leased.pop(task, None)
        self.tries.pop(task, None)
        self.waiting = [other for other in self.waiting if other != task]

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        places = [*self.waiting, *self.leased, *self.answered, *self.given_up]
        assert sorted(places) == sorted(f"task-{i}" for i in range(self.created))

    @invariant()
    def ledger_agrees(self) -> None:
        assert len(self.ledger) == len(self.leased)
        for task, lease in self.leased.items():
            held = self.ledger.holder(task)
            assert (
                task in self.ledger
                and held is not None
                and (held.actor, held.incarnation) == lease["holder"]
            )
        for i in range(self.created):
            assert self.ledger.attempts(f"task-{i}") == self.tries.get(f"task-{i}", 0)

    def _take_back(self, leases: list[Any], expected: list[str]) -> None:
        assert [lease.task_id for lease in leases] == expected, "in the order they were issued"
        for lease in leases:
            assert lease.payload is self.leased.pop(lease.task_id)["payload"]
            self.waiting.append(lease.task_id)


TestLeases = pytest.mark.slow(LeaseMachine.TestCase)


def test_the_life_of_a_task_whose_actor_stalls() -> None:
    ledger: LeaseLedger[str] = LeaseLedger(LEASE)
    ledger.issue("t", "rollout-0", 0, 0.0, "work")
    ledger.progress("rollout-0", 0, 9.0)
    assert ledger.expired(18.9) == []
    [lease] = ledger.expired(19.0)
    assert (lease.task_id, lease.attempt, lease.payload) == ("t", 1, "work")
    assert ledger.issue("t", "rollout-1", 0, 19.0, "work").attempt == 2
    assert ledger.accept("t", "rollout-0", 0) is None, "the late answer of the old holder"
    assert ledger.accept("t", "rollout-1", 0) == "work"
    assert ledger.accept("t", "rollout-1", 0) is None, "the duplicate"
    assert len(ledger) == 0 and ledger.attempts("t") == 0


def test_progress_of_an_old_incarnation_keeps_nothing_alive() -> None:
    ledger: LeaseLedger[str] = LeaseLedger(LEASE)
    ledger.issue("t", "rollout-0", 1, 0.0, "work")
    ledger.progress("rollout-0", 0, 9.0)
    assert [lease.task_id for lease in ledger.expired(10.0)] == ["t"]


def test_an_idle_past_does_not_shorten_a_new_lease() -> None:
    ledger: LeaseLedger[str] = LeaseLedger(LEASE)
    ledger.issue("first", "rollout-0", 0, 0.0, "work")
    ledger.progress("rollout-0", 0, 1.0)
    ledger.issue("second", "rollout-0", 0, 8.0, "work")
    assert [lease.task_id for lease in ledger.expired(11.0)] == ["first"]
    assert ledger.held_by("rollout-0") == ["second"]


def test_a_clock_that_steps_back_does_not_take_progress_away() -> None:
    ledger: LeaseLedger[str] = LeaseLedger(LEASE)
    ledger.issue("t", "rollout-0", 0, 0.0, "work")
    ledger.progress("rollout-0", 0, 9.0)
    ledger.progress("rollout-0", 0, 3.0)
    assert ledger.expired(18.0) == []
