from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from zppo_actors.supervisor import panels
from zppo_actors.supervisor.panels import History
from zppo_actors.supervisor.view import LiveView, new_events, render
from zppo_protocol.messages import ActorStatus, Status


def actor(name: str, role: str = "rollout", state: str = "working", **stats: float) -> ActorStatus:
    return ActorStatus(
        actor=name,
        role=role,  # type: ignore[arg-type]
        state=state,
        incarnation=1,
        credits=3,
        leases=9,
        policy_version=7,
        stats=stats,
    )


def status(
    step: int = 3,
    actors: int = 4,
    waiting: int = 1,
    events: list[str] | None = None,
    advice: list[str] | None = None,
    **gauges: float,
) -> Status:
    crew = [
        actor(f"rollout-{i}", tokens_per_second=1200.0, running=5.0, waiting=1.0)
        for i in range(actors)
    ]
    return Status(
        phase="training",
        step=step,
        total_steps=80,
        eta_seconds=65.0,
        actors=[*crew, actor("trainer", "trainer", "waiting")],
        counters={
            "questions_new": 96, "questions_replayed": 48, "groups_bcq": 12, "groups_ncq": 10, "admitted": 40,
            "graduated": 9, "evicted": 2, "buffer_size": 29, "buffer_capacity": 256, "tokens_generated": 12345,
            "restarts": 1, "reissued": 4, "buffer_by_entry/0": 20, "buffer_by_entry/0.125": 9,
            "updates": 160, "failed/teacher/teacher-0": 50, "failed/teacher/teacher-1": 10,
            "failed/compress/teacher-0": 5,
        },
        gauges={
            "accuracy_plain": 0.41, "accuracy_first_plain": 0.25, "accuracy_last_plain": 0.4,
            "accuracy_bcq": 0.33, "accuracy_first_bcq": 0.1, "accuracy_last_bcq": 0.3,
            "staleness_mean": 0.5, "staleness_max": 2, "wall_seconds": 92.0, **gauges,
        },
        waiting=[f"trainer waits for window {i}" for i in range(waiting)],
        events=events if events is not None else ["12:00:00 controller: started"],
        advice=advice or [],
    )  # fmt: skip


def drawn(picture: Status, width: int, height: int) -> list[str]:
    console = Console(
        width=width, height=height, force_terminal=True, file=io.StringIO(), record=True
    )
    history = History()
    history.record(picture)
    console.print(render(picture, history, "quickstart", width, height))
    return console.export_text().split("\n")[:-1]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(24, 200),
    st.integers(5, 60),
    st.integers(0, 70),
    st.integers(0, 6),
    st.integers(0, 30),
    st.integers(0, 5),
)
def test_the_picture_fits_every_window(
    width: int, height: int, actors: int, waiting: int, events: int, advice: int
) -> None:
    picture = status(
        actors=actors,
        waiting=waiting,
        events=["x" * 150] * events,
        advice=[f"severe rule: {'y' * 150}"] * advice,
    )
    lines = drawn(picture, width, height)
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_a_usual_terminal_shows_everything() -> None:
    text = "\n".join(drawn(status(heldout_before=0.38, heldout_last=0.43, max_staleness=2), 80, 24))
    for part in (
        "step 3/80 · 1:05 left",
        "rollout-3",
        "trainer waits for window 0",
        "1 restart · 4 tasks re-issued · 60 teacher failed · 5 compress failed",
        "plain     25 % →  40 %",
        "held-out  38 % →  43 %",
        "29 of 256",
        "entry 0:20 .125:9",
        "40 in · 9 graduated · 2 evicted",
        "staleness 0.50 · max 2 · bound 2",
        "controller: started",
    ):
        assert part in text


def test_advice_stands_in_the_picture_before_what_waits() -> None:
    said = ["severe no_gradient: nothing", "warning engines_idle: much"]
    lines = drawn(status(advice=said), 80, 26)
    places = [i for i, line in enumerate(lines) for text in said if line.startswith(f" {text}")]
    [waits] = [i for i, line in enumerate(lines) if "trainer waits for window 0" in line]
    assert places == [waits - 2, waits - 1]


def test_responses_of_no_use_are_shown_unless_there_are_none() -> None:
    [line] = [
        line
        for line in drawn(
            status(answers_missing=0.31, truncated=0.0, answers_timed_out=0.02), 80, 26
        )
        if "windows" in line
    ]
    assert "31 % without a box · 2 % not graded in time" in line and "cut off" not in line


def test_a_crowd_of_actors_is_summed_in_its_last_row() -> None:
    text = "\n".join(drawn(status(actors=64), 100, 30))
    assert "+ 51 more" in text
    assert "60,000" in text
    assert "trainer waits for window 0" in text and "controller: started" in text


def test_text_from_the_wire_is_never_markup() -> None:
    picture = status(events=["[red]rollout-0[/red] [/nonsense]"], waiting=0)
    assert any("[red]rollout-0[/red] [/nonsense]" in line for line in drawn(picture, 80, 24))


def test_text_from_the_wire_cannot_steer_the_terminal() -> None:
    """A server may answer whatever it likes, and its words become events, advice and verdicts."""
    hostile, harmless = (
        "HTTP 500: \x1b]0;mine\x07\x1b[2J\u202e",
        r"HTTP 500: \x1b]0;mine\x07\x1b[2J\u202e",
    )
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(
            file=out, width=100, height=40, force_terminal=terminal, color_system=None
        )
        view = LiveView(console, "quickstart")
        view.update(status(events=[hostile], advice=[hostile]))
        view.log(hostile)
        view.close(hostile)
        assert out.getvalue().count(harmless) >= 4 and "\x1b]" not in out.getvalue()


def plain_view() -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    return LiveView(Console(file=out, width=40, force_terminal=False), "quickstart"), out


STEP_3 = (
    "step 3/80 · plain 41 % · BCQ 33 % · buffer 29/256 · graduated 9 · staleness 0.50 · 4,800 "
    "tok/s · 1:05 left"
)  # fmt: skip


def test_without_a_terminal_every_change_is_one_line_and_is_said_once() -> None:
    view, out = plain_view()
    view.update(status(step=2, events=["a"]))
    view.update(status(step=2, events=["a"]))
    view.update(status(step=3, events=["a", "b", "c"]))
    view.update(status(step=3, events=["b", "c"]))
    lines = out.getvalue().splitlines()
    assert lines == ["a", "phase: training", STEP_3.replace("step 3", "step 2"), "b", "c", STEP_3]


def test_the_closing_block() -> None:
    view, out = plain_view()
    view.update(
        status(
            step=80,
            events=[],
            advice=["severe no_gradient: nothing"],
            max_staleness=2,
            heldout_before=0.38,
            heldout_last=0.43,
        )
    )
    out.truncate(0)
    out.seek(0)
    view.close("finished")
    view.close("finished")
    assert out.getvalue().splitlines() == [
        "finished",
        "  steps      80 of 80 in 1:32",
        "  accuracy   plain 25 % → 40 % · BCQ 10 % → 30 %",
        "  held-out   38 % → 43 %",
        "  questions  96 new · 48 replayed",
        "  groups     12 BCQ · 10 NCQ",
        "  buffer     29 inside · 40 admitted · 9 graduated · 2 evicted",
        "  staleness  at most 2 (bound 2)",
        "  tokens     12,345 sampled · 160 updates",
        "  faults     1 restart · 4 tasks re-issued · 60 teacher failed · 5 compress failed",
        "  severe no_gradient: nothing",
    ]


def test_a_run_that_ends_before_its_first_status_shows_the_verdict() -> None:
    view, out = plain_view()
    view.close("the controller died")
    view.update(status())
    assert out.getvalue() == "the controller died\n"


def test_on_a_terminal_the_picture_is_redrawn_and_the_closing_block_stays() -> None:
    out = io.StringIO()
    view = LiveView(
        Console(file=out, width=80, height=24, force_terminal=True, color_system=None), "quickstart"
    )
    view.update(status(step=2))
    view.log("stopping")
    view.update(status(step=3))
    view.close("interrupted")
    text = out.getvalue()
    assert "step 2/80" in text and "step 3/80" in text and "stopping" in text
    assert "interrupted" in text.rpartition("╯")[2]


def test_a_long_line_is_broken_between_words_on_a_terminal_and_nowhere_else() -> None:
    said = "the first one in 99 % where the question is short"
    for terminal, lines in (
        (True, ["the first one in 99 %", "where the question is", "short"]),
        (False, [said]),
    ):
        out = io.StringIO()
        console = Console(file=out, width=22, height=24, force_terminal=terminal, color_system=None)
        LiveView(console, "quickstart").log(said)
        assert [line.rstrip() for line in out.getvalue().splitlines()] == lines


@given(st.lists(st.integers(0, 3).map(str), max_size=12), st.integers(0, 12), st.integers(1, 6))
def test_new_events_of_a_growing_list_are_found(log: list[str], seen: int, window: int) -> None:
    """Repeats make the cut ambiguous; what is called new is then still a tail of the list and
    explains it."""
    before, now = log[:seen][-window:], log[-window:]
    fresh = new_events(before, now)
    assert fresh == now[len(now) - len(fresh) :]
    assert len(fresh) <= max(len(log) - seen, 0)


@given(st.lists(st.integers(), unique=True, max_size=12), st.integers(0, 12), st.integers(1, 6))
def test_new_events_that_differ_are_found_exactly(log: list[int], seen: int, window: int) -> None:
    names = list(map(str, log))
    fresh = new_events(names[:seen][-window:], names[-window:])
    assert fresh == names[seen:][-window:]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (99_999, "99,999"), (123_456, "123k"), (999_600, "1.0M"), (2_340_000, "2.3M")],
)
def test_counts_stay_short(value: float, text: str) -> None:
    assert panels.count(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0:00"), (65, "1:05"), (3661, "1:01:01"), (-5, "0:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert panels.duration(seconds) == text


def test_a_sparkline_spans_its_own_range() -> None:
    assert (
        panels.sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
        or panels.sparkline([0.0, 0.5, 1.0], 10) == "▁▄█"
    )
    assert panels.sparkline([0.1], 10) == ""
    assert len(panels.sparkline([float(i) for i in range(100)], 10)) == 10


def test_history_counts_each_step_once() -> None:
    history = History()
    for step in (1, 1, 2):
        history.record(status(step=step))
    assert history.values["plain"] == [0.41, 0.41]


def test_what_a_teacher_costs_stands_beside_its_limit() -> None:
    counters = {
        "spent/tokens/draw": 1200, "spent/tokens/judge": 34, "spent/requests/draw": 0,
        "budget_tokens": 5000,
    }  # fmt: skip
    assert panels.spending(counters) == ["teacher 1,234 of 5,000 tokens"]
    assert panels.spending({**counters, "budget_tokens": 250_000, "budget_requests": 9}) == [
        "teacher 1,234 of 250k tokens",
        "teacher 0 of 9 requests",
    ]
    assert panels.spending({}) == []
