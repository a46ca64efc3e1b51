"""The staleness inequality and the adaptive lead."""

from __future__ import annotations

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


def test_a_starving_trainer_raises_the_lead_and_idle_windows_lower_it() -> None:
    pacer = Pacer(4, PacerState.fresh(4))
    assert pacer.lead == 1
    pacer.shipped(trainer_waited=2.0, window_waited=0.0, step_seconds=1.0)
    pacer.shipped(trainer_waited=2.0, window_waited=0.0, step_seconds=1.0)
    assert pacer.lead == 3
    for _ in range(PATIENCE):
        assert pacer.lead == 3
        pacer.shipped(trainer_waited=0.0, window_waited=0.9, step_seconds=1.0)
    assert pacer.lead == 2
