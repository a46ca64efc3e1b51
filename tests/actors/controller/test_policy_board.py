"""Which policy versions are kept, and who loads which (Hypothesis state machine)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from zppo_actors.controller.policies import PolicyBoard
from zppo_protocol.values import PolicyManifest

ENGINES = ["rollout-0", "rollout-1", "rollout-2"]
engines = st.sampled_from(ENGINES)


def manifest(version: int) -> PolicyManifest:
    return PolicyManifest(
        version=version, path=f"/p/{version}", tensors=[], digest=f"digest-{version}"
    )


class BoardMachine(RuleBasedStateMachine):
    """The model keeps files as a set; reading a file that is gone is the error to find."""

    def __init__(self) -> None:
        super().__init__()
        self.board = PolicyBoard()
        self.version = -1
        self.files: set[int] = set()
        self.reading: dict[str, int] = {}
        self.loaded: dict[str, int] = {}

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.files.add(self.version)
        self.board.publish(manifest(self.version))

    @rule(engine=engines)
    def announce(self, engine: str) -> None:
        wanted = self.board.next_for(engine)
        if engine in self.reading or self.loaded.get(engine, -1) == self.version:
            assert wanted is None
        else:
            assert wanted is not None and wanted.version == self.version, (
                "engines load the newest version"
            )
            self.reading[engine] = wanted.version

    @rule(engine=engines)
    def acknowledge(self, engine: str) -> None:
        if engine in self.reading:
            version = self.reading.pop(engine)
            assert version in self.files, "a file was released while it was read"
            assert self.board.loaded(engine, version, f"digest-{version}")
            self.loaded[engine] = version

    @rule(engine=engines)
    def die(self, engine: str) -> None:
        self.board.forget(engine)
        self.reading.pop(engine, None)
        self.loaded.pop(engine, None)

    @rule()
    def release(self) -> None:
        gone = self.board.release()
        assert len(gone) == len(set(gone)) and set(gone) <= self.files
        self.files -= set(gone)
        assert self.files == ({self.version} if self.version >= 0 else set()) | set(
            self.reading.values()
        )


TestBoard = BoardMachine.TestCase
TestBoard.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBoard.pytestmark = [pytest.mark.slow]


def test_other_bytes_or_an_unasked_version_are_no_acknowledgement() -> None:
    board = PolicyBoard()
    board.publish(manifest(0))
    assert not board.loaded("rollout-0", 0, "digest-0"), "nobody asked it to load"
    assert board.next_for("rollout-0") is not None
    assert not board.loaded("rollout-0", 0, "digest-1")


def test_versions_only_grow() -> None:
    board = PolicyBoard()
    board.publish(manifest(3))
    with pytest.raises(ValueError, match="policy version 3 was published after version 3"):
        board.publish(manifest(3))
