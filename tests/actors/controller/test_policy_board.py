"""Which policy versions are kept, and who loads which (Hypothesis state machine)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from zppo_actors.controller.policies import HOME, PolicyBoard
from zppo_protocol.values import PolicyManifest

CARRIER_OF = {"rollout-1": "weights-1", "rollout-2": "weights-1", "rollout-3": "weights-2"}
CARRIERS = sorted(set(CARRIER_OF.values()))
BOUND = 1
readers = st.sampled_from(["rollout-0", *CARRIER_OF, *CARRIERS])


def place_of(reader: str) -> str:
    """Where a reader reads."""
    return CARRIER_OF.get(reader, HOME)


def manifest(version: int) -> PolicyManifest:
    return PolicyManifest(
        version=version, path=f"/p/{version}", tensors=[], digest=f"digest-{version}"
    )


class BoardMachine(RuleBasedStateMachine):
    """The model keeps the files of each host as a set; reading a file that is gone, or that its
    host does not have, is the error to find."""

    def __init__(self) -> None:
        super().__init__()
        self.board = PolicyBoard(CARRIER_OF, BOUND)
        self.version = -1
        self.files: dict[str, set[int]] = {place: set() for place in (HOME, *CARRIERS)}
        self.reading: dict[str, int] = {}
        self.loaded: dict[str, int] = {}

    def newest(self, place: str) -> int:
        return self.version if place == HOME else self.loaded.get(place, -1)

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.files[HOME].add(self.version)
        self.board.publish(manifest(self.version))

    @rule(reader=readers)
    def announce(self, reader: str) -> None:
        wanted = self.board.next_for(reader)
        newest, told = self.newest(place_of(reader)), self.reading.get(reader)
        useless = reader in CARRIERS and told is not None and told < newest - BOUND
        if (told is not None and not useless) or self.loaded.get(reader, -1) >= newest:
            assert wanted is None
        else:
            assert wanted is not None and wanted.version == newest, "the newest of its host"
            self.reading[reader] = newest

    @rule(reader=readers)
    def acknowledge(self, reader: str) -> None:
        if reader not in self.reading:
            return
        version = self.reading.pop(reader)
        assert version in self.files[place_of(reader)], "a file was released while it was read"
        assert self.board.loaded(reader, version, f"digest-{version}")
        self.loaded[reader] = version
        if reader in CARRIERS:
            self.files[reader].add(version)

    @rule(reader=readers)
    def die(self, reader: str) -> None:
        self.board.forget(reader)
        self.reading.pop(reader, None)
        self.loaded.pop(reader, None)

    @rule()
    def release(self) -> None:
        gone = self.board.release()
        assert len(gone) == len(set(gone))
        for place, version in gone:
            self.files[place].discard(version)  # of one that was given up there is nothing
        for place, files in self.files.items():
            newest = self.newest(place)
            read = {v for reader, v in self.reading.items() if place_of(reader) == place}
            if newest >= 0:
                assert files == {newest} | {v for v in read if v < newest}


TestBoard = BoardMachine.TestCase
TestBoard.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBoard.pytestmark = [pytest.mark.slow]


def test_other_bytes_or_an_unasked_version_are_no_acknowledgement() -> None:
    board = PolicyBoard()
    board.publish(manifest(0))
    assert not board.loaded("rollout-0", 0, "digest-0"), "nobody asked it to load"
    assert board.next_for("rollout-0") is not None
    assert not board.loaded("rollout-0", 0, "digest-1")


def test_who_was_told_twice_answers_twice() -> None:
    """It was forgotten while it loaded version 0, and greeted again; version 0 is gone by then."""
    board = PolicyBoard()
    board.publish(manifest(0))
    assert board.next_for("rollout-0") == manifest(0)
    board.forget("rollout-0")
    board.publish(manifest(1))
    assert board.next_for("rollout-0") == manifest(1) and board.release() == [("", 0)]
    assert board.loaded("rollout-0", 0, "digest-0") and board.loaded("rollout-0", 1, "digest-1")
    assert board.loaded("rollout-0", 1, "digest-1")
    assert not board.loaded("rollout-0", 1, "digest-0") and not board.loaded("rollout-0", 2, "?")


def test_versions_only_grow() -> None:
    board = PolicyBoard()
    board.publish(manifest(3))
    with pytest.raises(ValueError, match="policy version 3 was published after version 3"):
        board.publish(manifest(3))


def test_an_engine_hears_of_a_version_when_its_host_has_it() -> None:
    board = PolicyBoard({"rollout-1": "weights-1"}, max_staleness=1)
    board.publish(manifest(0))
    assert board.next_for("rollout-0") == manifest(0) and board.next_for("rollout-1") is None
    assert board.next_for("weights-1") == manifest(0) and board.next_for("weights-1") is None
    assert board.next_for("rollout-1") is None
    assert board.loaded("weights-1", 0, "digest-0")
    assert board.next_for("rollout-1") == manifest(0)


def test_a_transfer_goes_on_while_its_version_is_of_use() -> None:
    board = PolicyBoard({"rollout-1": "weights-1"}, max_staleness=1)
    board.publish(manifest(0))
    assert board.next_for("weights-1") == manifest(0)
    board.publish(manifest(1))
    assert board.next_for("weights-1") is None and board.release() == []
    board.publish(manifest(2))
    assert board.next_for("weights-1") == manifest(2), "version 1 is skipped, 0 given up"
    assert board.release() == [("", 0), ("", 1)]
    # It had been whole before that word came.
    assert board.loaded("weights-1", 0, "digest-0")
    assert board.next_for("rollout-1") == manifest(0)
    assert board.loaded("weights-1", 2, "digest-2") and board.release() == []
    assert board.loaded("rollout-1", 0, "digest-0")
    assert board.release() == [("weights-1", 0)]


def test_a_carrier_is_told_twice_what_may_go() -> None:
    board = PolicyBoard({"rollout-1": "weights-1"})
    gone = []
    for version in range(4):
        board.publish(manifest(version))
        for reader in ("weights-1", "rollout-1"):
            assert board.next_for(reader) is not None
            assert board.loaded(reader, version, f"digest-{version}")
        gone.append([v for place, v in board.release() if place == "weights-1"])
        assert board.release() == []
    assert gone == [[], [0], [0, 1], [1, 2]]


def test_a_carrier_that_starts_anew_has_nothing_until_it_says_so() -> None:
    board = PolicyBoard({"rollout-1": "weights-1"})
    board.publish(manifest(0))
    assert board.next_for("weights-1") is not None and board.loaded("weights-1", 0, "digest-0")
    board.forget("weights-1")
    assert board.next_for("rollout-1") is None
    assert board.next_for("weights-1") == manifest(0)
    assert not board.loaded("weights-1", 0, "digest-1"), "other bytes"
