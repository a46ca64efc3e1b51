"""The staleness inequality and the adaptive lead."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from zppo.scheduling.pacing import PATIENCE, Pacer, PacerState


@given(bound=st.integers(0, 8), window=st.integers(0, 50), horizon=st.integers(0, 50))
def test_an_opened_window_can_only_get_versions_within_the_bound(
    bound: int, window: int, horizon: int
) -> None:
    pacer = Pacer(bound, PacerState(lead=bound))
    if pacer.may_open(window, horizon):
        assert window - horizon <= bound
        assert pacer.min_version(window) <= horizon, (
            "some engine can always have a version that is new enough"
        )
        assert window - pacer.min_version(window) <= bound


@given(
    bound=st.integers(0, 8),
    waits=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=50),
)
def test_the_lead_never_leaves_its_range(bound: int, waits: list[tuple[float, float]]) -> None:
    pacer = Pacer(bound, PacerState.fresh(bound))
    for trainer, window in waits:
        pacer.shipped(trainer, window, step_seconds=1.0)
        assert min(1, bound) <= pacer.lead <= bound


def test_a_starving_trainer_raises_the_lead_to_the_bound() -> None:
    pacer = Pacer(4, PacerState.fresh(4))
    for expected in (2, 3, 4, 4):
        pacer.shipped(trainer_waited=2.0, window_waited=0.0, step_seconds=1.0)
        assert pacer.lead == expected


def test_the_wait_for_the_first_window_teaches_nothing() -> None:
    pacer = Pacer(8, PacerState.fresh(8))
    pacer.shipped(trainer_waited=300.0, window_waited=0.0, step_seconds=0.0)
    for _ in range(20):
        pacer.shipped(trainer_waited=0.0, window_waited=5.0, step_seconds=20.0)
        assert pacer.lead == 1


def test_windows_queued_behind_a_slow_one_are_no_calm() -> None:
    """Every fifth window is slow; the four behind it lie about."""
    pacer = Pacer(16, PacerState.fresh(16))
    for shipped in range(40):
        slow = shipped % 5 == 0
        pacer.shipped(20.0 if slow else 0.0, 0.0 if slow else 5.0, step_seconds=1.0)
    assert pacer.lead == 16


def test_the_lead_falls_by_one_when_so_many_windows_have_waited_and_the_trainer_did_not() -> None:
    pacer = Pacer(4, PacerState(lead=3))
    for shipped in range(3 + PATIENCE):
        assert pacer.lead == 3, shipped
        pacer.shipped(trainer_waited=0.0, window_waited=0.9, step_seconds=1.0)
    assert pacer.lead == 2


@given(state=st.builds(PacerState, lead=st.integers(0, 8), calm=st.integers(0, 8)))
def test_a_state_of_before_goes_on(state: PacerState) -> None:
    """Checkpoints once held the lead and the calm windows alone."""
    saved = msgspec.json.encode({"lead": state.lead, "calm": state.calm})
    assert msgspec.json.decode(saved, type=PacerState) == state
