"""The hand that writes spans: what a process leaves when it is killed, when there is too much, and
when the disk does not take it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from zppo.records.timeline import Life, Span, decoded, read_timeline
from zppo_actors.timeline import MOST_SPANS, Timeline, begin_life

KILLED = """
import os, pathlib, signal, sys, time
from zppo_actors.timeline import Timeline, begin_life
path = pathlib.Path(sys.argv[1])
timeline = Timeline(path, begin_life("r", "grader-0", 1))
timeline.span("grade", timeline.now(), step=3, what="3/q/plain/grade", size=8)
file = path / "grader-0.jsonl"
while not file.exists() or b"3/q/plain/grade" not in file.read_bytes():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no disk that does not answer."""
    monkeypatch.setattr("zppo_actors.timeline.CLOSE_SECONDS", 600.0)


def lines_of(path: Path) -> list[object]:
    lines, unreadable = decoded(path.read_bytes())
    assert unreadable == 0
    return list(lines)


@pytest.mark.slow
def test_what_a_killed_process_wrote_is_there_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "timeline"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(folder)], timeout=600)
    assert done.returncode == -9
    again = Timeline(folder, begin_life("r", "grader-0", 2))
    with again.during("grade", step=4):
        pass
    again.close()
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    [track] = timeline.tracks
    assert [(span.kind, span.step) for span in track.spans] == [("grade", 3), ("grade", 4)]
    assert [life.incarnation for _, life in track.lives] == [1, 2]


def test_what_comes_too_fast_is_merged_and_its_time_kept(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, begin_life("r", "grader-0", 1))
    begin = time.monotonic()
    for number in range(5000):
        timeline.span("grade", begin + 0.0001 * number, begin + 0.0001 * (number + 1))
    timeline.close()
    spans = [line for line in lines_of(tmp_path / "grader-0.jsonl") if isinstance(line, Span)]
    assert len(spans) <= 2 * MOST_SPANS  # a flush may have come in between
    assert sum(span.count for span in spans) == 5000
    assert sum(span.busy for span in spans) == pytest.approx(500_000, rel=0.01)


def test_the_file_stays_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "trainer.jsonl"
    for _ in range(12):
        timeline = Timeline(tmp_path, begin_life("r", "trainer", 1), max_bytes=8000)
        for number in range(60):
            timeline.span("train", time.monotonic(), time.monotonic() + 0.5, step=number)
        timeline.close()
    assert path.stat().st_size <= 8000
    assert sum(isinstance(line, Life) for line in lines_of(path)) == 12
    assert sum(line.count for line in lines_of(path) if isinstance(line, Span)) == 720


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_costs_spans_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trainer.jsonl").symlink_to("/dev/full")
    timeline = Timeline(tmp_path, begin_life("r", "trainer", 1))
    timeline._flush()
    timeline._flush()
    timeline.span("train", time.monotonic())
    timeline.close()
    assert timeline.lost == 1
    path = tmp_path / "trainer.jsonl"
    assert caplog.messages == [
        f"{path}: cannot be written (No space left on device)",
        f"{path}: spans lost: 1",
    ]
