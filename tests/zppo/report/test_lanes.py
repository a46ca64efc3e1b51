"""The drawing of the timeline: what a pixel of a lane says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from zppo.records.timeline import Life, Room, Span, Timeline, Track, encoded
from zppo.report import figures, load, plots
from zppo.report.lanes import COLOURS, COLUMNS, MOST_OF_POOL, ROWS, _lane, _recent, draw_lanes

LIFE = Life("r", "rollout-0", 1, 1, "b", 0.0, 0.0)


def span(kind: str, begin: int, end: int, size: float = 1) -> Span:
    return Span(kind, begin, end, 3, "", size, 1, end - begin)


def share(image: np.ndarray, column: int, kind: str) -> float:
    """Part of the height of a column that has the colour of a kind."""
    return float(np.isclose(image[:, column], to_rgb(COLOURS[kind])).all(axis=1).mean())


def test_a_lane_is_as_high_as_the_room_that_is_taken() -> None:
    """Half the time 4 of 8 sequences, then waiting, then gone."""
    spans = [span("sample", 0, 4 * COLUMNS, 4), span("wait", 4 * COLUMNS, 6 * COLUMNS)]
    image = _lane(Track("rollout-0", [(0, LIFE)], spans, 8), 0, 8 * COLUMNS)
    assert share(image, 10, "sample") == ROWS // 2 / ROWS
    assert share(image, COLUMNS // 2 + 10, "wait") == 1.0
    assert (image[:, COLUMNS - 10] == 1.0).all()


def test_the_shortest_work_is_seen_and_lanes_are_bounded() -> None:
    track = Track("trainer", [(0, LIFE)], [span("wait", 0, 10**9), span("publish", 500, 501)], 0)
    assert share(_lane(track, 0, 10**9), 0, "publish") == 1 / ROWS
    many = [Track(f"rollout-{i}", [(0, LIFE)], [span("sample", 0, 10)], 8) for i in range(40)]
    with plots.look():
        figure = draw_lanes(Timeline(many, 0.0, 0, 10))
    assert len(figure.axes[0].get_yticklabels()) == MOST_OF_POOL


@pytest.mark.parametrize(("steps", "begin"), [(0, 0), (1, 50), (4, 50), (5, 200), (7, 400)])
def test_the_last_steps_begin_where_the_step_before_them_ended(steps: int, begin: int) -> None:
    """The trainer loads for 50, waits until 100, and takes 100 a step; then it waits for 900."""
    trained = [span("train", 100 * n, 100 * (n + 1)) for n in range(1, steps + 1)]
    waits = [span("wait", 50, 100), span("wait", 100 * steps + 100, 100 * steps + 1000)]
    spans = sorted([span("start", 0, 50), *waits, *trained], key=lambda one: one.begin)
    whole = Timeline([Track("trainer", [(0, LIFE)], spans, 0)], 0.0, 0, spans[-1].end)
    recent = _recent(whole)
    assert recent.begin == begin
    assert recent.end == (100 * (steps + 1) if steps else whole.end)


@pytest.mark.slow
def test_the_report_draws_the_timeline_with_its_sentence(fake_run: Callable[..., Path]) -> None:
    run_dir = fake_run(steps=1)
    (run_dir / "timeline").mkdir()
    second = 1_000_000
    trainer = [span("wait", 0, 3 * second), span("train", 3 * second, 4 * second)]
    (run_dir / "timeline/trainer.jsonl").write_bytes(encoded([LIFE, *trainer]))
    sampled = span("sample", 0, 3 * second, 8)
    (run_dir / "timeline/rollout-0.jsonl").write_bytes(encoded([LIFE, Room(8), sampled]))
    [drawing] = [d for d in figures.draw_all(load.load_run(run_dir)) if "waited" in d.title]
    assert drawing.wide and drawing.section == "The machine"
    assert drawing.caption == (
        "Of 4 s the trainer worked 25 % and waited 75 %: 75 % for the rollout engine. The "
        "bottleneck was the rollout engine. At work: trainer 25 %; rollout 100 %, 100 % of its "
        "room."
    )
