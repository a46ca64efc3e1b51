"""Clocks of several hosts: spans have their place whatever the wall clocks say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.records import clocks
from zppo.records.clocks import Clocks, Other, read_clocks, write_clocks
from zppo.records.timeline import Life, Span, encoded, read_timeline
from zppo_protocol.messages import HostReport

DAY = 86_400.0


@given(
    st.floats(-1e7, 1e7),
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 300)), min_size=1, max_size=20),
)
def test_the_fastest_report_tells(ahead: float, reports: list[tuple[float, float]]) -> None:
    """However late reports come, and in whatever order, the place is late by the fastest one."""
    known = Clocks("ours", {})
    for sent, way in reports:
        known.hear("theirs", sent - ahead, sent + way)
    fastest = min(way for _, way in reports)
    found = known.known["theirs"]
    assert found.boot == "ours"
    assert ahead + fastest - 1e-6 <= found.seconds <= ahead + fastest + clocks.LEAST_SECONDS + 1e-6


def test_a_boot_of_its_own_and_one_too_many_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "MOST_BOOTS", 1)
    known = Clocks("ours", {})
    assert not known.hear("ours", 5.0, 5.0) and not known.hear("", 5.0, 5.0)
    assert known.hear("a", 5.0, 7.0) and not known.hear("b", 5.0, 7.0)
    assert not known.hear("a", 5.0, 6.9995)  # nothing that is worth a write
    assert known.hear("a", 5.0, 6.0)
    assert known.known == {"a": Other("ours", 1.0)}
    # The supervisor's host was booted again: what its old clock showed says nothing of its new one.
    assert Clocks("new", known.known).hear("a", 5.0, 900.0)


def test_spans_of_a_host_whose_wall_clock_is_wrong(tmp_path: Path) -> None:
    """An engine samples from the 5th to the 7th second of a run, on a host whose clock is three
    days ahead; without the word of its reports it would lie there."""
    folder = tmp_path / "timeline"
    folder.mkdir()
    near = Life("r", "trainer", 0, 1, "ours", 100.0, 50_000.0)
    far = Life("r", "rollout-0", 0, 1, "theirs", 9_002.0, 50_002.0 + 3 * DAY)
    (folder / "trainer.jsonl").write_bytes(encoded([near, Span("train", 8_000_000, 9_000_000)]))
    (folder / "rollout-0.jsonl").write_bytes(encoded([far, Span("sample", 3_000_000, 5_000_000)]))
    lost = read_timeline(tmp_path)
    assert lost is not None and lost.seconds > DAY

    write_clocks(folder, {"theirs": Other("ours", 100.0 - 9_000.0), "third": Other("gone", 1.0)})
    found = read_timeline(tmp_path)
    assert found is not None and found.seconds == 9.0 and found.wall == 50_000.0
    spans = {track.actor: track.spans[0] for track in found.tracks}
    assert (spans["rollout-0"].begin, spans["rollout-0"].end) == (5_000_000, 7_000_000)
    assert (spans["trainer"].begin, spans["trainer"].end) == (8_000_000, 9_000_000)


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1}', b"\xff"])
def test_a_file_that_cannot_be_read_tells_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / clocks.CLOCKS).write_bytes(data)
    assert read_clocks(tmp_path) == {}


NEAR = Life("r", "trainer", 0, 1, "ours", 100.0, 50_000.0)
FAR = Life("r", "rollout-0", 0, 1, "theirs", 100.0, 50_000.0)


@pytest.mark.parametrize(
    "lines",
    [
        encoded([msgspec.structs.replace(FAR, monotonic=1e305)]),
        encoded([msgspec.structs.replace(FAR, wall=1.7e308)]),
        encoded([FAR]) + b'["sample",1,' + b"9" * 400 + b"]\n",
    ],
)
def test_what_a_host_writes_cannot_stretch_the_timeline_beyond_all_bounds(
    tmp_path: Path, lines: bytes
) -> None:
    """Otherwise the report of the whole run fails."""
    folder = tmp_path / "timeline"
    folder.mkdir()
    (folder / "trainer.jsonl").write_bytes(encoded([NEAR, Span("train", 0, 1_000_000)]))
    (folder / "rollout-0.jsonl").write_bytes(lines)
    found = read_timeline(tmp_path)
    assert found is not None and (found.unreadable, found.seconds) == (1, 1.0)


@pytest.mark.parametrize("clock", [float("nan"), float("inf"), 1e300, -1.0])
def test_a_clock_that_no_host_has_is_no_report(clock: float) -> None:
    said = msgspec.to_builtins(HostReport(attempt="", actors=[], parts=[], clock=clock))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(said, HostReport)
