"""What an actor does on the words that are about membership, under a clock that is an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_actors.membership import GREETING_BEATS, LONGEST_REASON, Leave, Membership
from zppo_protocol.messages import Credits, Forgotten, Goodbye, Rejected, Shutdown, Welcome


def test_the_welcome_sets_the_pace() -> None:
    membership = Membership(5.0)
    assert not membership.welcomed
    membership.obey(Welcome(heartbeat_seconds=2.0))
    assert membership.welcomed and membership.seconds == 2.0


def test_a_shutdown_is_a_farewell_without_a_reason() -> None:
    with pytest.raises(Leave) as leave:
        Membership(1.0).obey(Shutdown(reason="finished"))
    assert leave.value.exit_code == 0 and leave.value.goodbye() == Goodbye()


def test_a_rejection_ends_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Leave) as leave:
        Membership(1.0).obey(Rejected(reason="another run"))
    said = "the controller refuses to work with this process: another run"
    assert leave.value.exit_code == 1 and leave.value.goodbye() == Goodbye(reason=said)
    assert f"leaving: {said}" in caplog.text


def test_what_belongs_to_another_role_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    membership = Membership(1.0)
    membership.obey(Credits(count=1))
    assert not membership.welcomed
    assert "ignored a Credits, which is not for this actor" in caplog.text


def test_last_words_are_cut() -> None:
    assert Leave(1, "x" * 10**6).goodbye() == Goodbye(reason="x" * LONGEST_REASON)


@given(st.floats(0.01, 100.0), st.lists(st.floats(0.0, 50.0), min_size=1, max_size=50))
def test_heartbeats_keep_their_distance_and_none_is_left_out(
    seconds: float, steps: list[float]
) -> None:
    """Against the rule itself: a beat at the first look, then at each look that comes `seconds` or
    more after the last beat."""
    membership, now, last = Membership(seconds), 0.0, float("-inf")
    for step in steps:
        now += step
        rest = membership.rest(now)
        assert rest == max(0.0, last + seconds - now)
        beat = membership.due(now)
        assert beat == (rest == 0.0)
        last = now if beat else last


def test_who_cannot_begin_anew_leaves_when_it_is_forgotten() -> None:
    with pytest.raises(Leave) as leave:
        Membership(1.0).obey(Forgotten())
    assert (leave.value.exit_code, leave.value.reason) == (
        1,
        "the controller has forgotten this process",
    )


@given(st.lists(st.floats(0.0, 30.0), max_size=30))
def test_many_words_of_one_forgetting_ask_for_one_greeting(pauses: list[float]) -> None:
    membership, now, greeted = Membership(1.0), 0.0, [float("-inf")]
    for pause in pauses:
        now += pause
        if membership.greets_again(now):
            assert now - greeted[-1] >= GREETING_BEATS
            greeted.append(now)
        else:
            assert now - greeted[-1] < GREETING_BEATS


def test_only_a_second_welcome_begins_anew() -> None:
    membership, welcome = Membership(1.0), Welcome(heartbeat_seconds=1.0)
    assert not membership.begins_anew(welcome)
    membership.obey(welcome)
    assert membership.begins_anew(welcome) and not membership.begins_anew(Credits(count=1))
