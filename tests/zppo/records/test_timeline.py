"""The timeline: its files, what is merged, how clocks are joined, whose waiting it was, and the
trace against a reading of the trace event format that shares no code with the writer."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import questions

from zppo.algorithm.window import EVALUATE, PLAIN, TEACHER, Group
from zppo.config.topology import JUDGE
from zppo.records.timeline import (
    GRADE,
    GRADING,
    OF_TASKS,
    Life,
    Room,
    Span,
    Timeline,
    Track,
    decoded,
    encoded,
    last,
    merged,
    read_timeline,
    thinned,
    window_of,
)
from zppo.records.trace import chrome_trace
from zppo.records.work import sentence_of, shares_of, work_of
from zppo.scheduling.targets import GradeTarget, JudgeTarget, SampleTarget
from zppo.timeline import main
from zppo_protocol.values import Prompt

SECOND = 1_000_000


def life(actor: str = "trainer", at: float = 100.0, wall: float = 5000.0, **other: Any) -> Life:
    values = {"run_id": "r", "incarnation": 1, "pid": 1, "boot": "b", **other}
    return Life(actor=actor, monotonic=at, wall=wall, **values)


def span(kind: str, begin: float, end: float, step: int = -1, what: str = "", n: float = 1) -> Span:
    low, high = round(begin * SECOND), round(end * SECOND)
    return Span(kind, low, high, step, what, n, 1, high - low)


def write(run_dir: Path, actor: str, *lines: Life | Room | Span) -> None:
    (run_dir / "timeline").mkdir(parents=True, exist_ok=True)
    with (run_dir / "timeline" / f"{actor}.jsonl").open("ab") as file:
        file.write(encoded(lines))


spans = st.lists(
    st.builds(
        lambda kind, begin, length, size: Span(kind, begin, begin + length, 3, "", size, 1, length),
        st.sampled_from(["sample", "wait", "load"]),
        st.integers(0, 10**7),
        st.integers(0, 10**6),
        st.integers(1, 8),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(spans, st.integers(1, 40))
def test_merging_keeps_time_and_work(found: list[Span], most: int) -> None:
    few = merged(found, most)
    kinds = {one.kind for one in found}
    assert len(few) <= max(most, len(kinds))
    for kind in kinds:
        before = [one for one in found if one.kind == kind]
        after = [one for one in few if one.kind == kind]
        assert sum(one.busy for one in after) == sum(one.end - one.begin for one in before)
        assert sum(one.count for one in after) == len(before)
        assert min(one.begin for one in after) == min(one.begin for one in before)
        assert max(one.end for one in after) == max(one.end for one in before)
        work = sum(one.size * one.busy for one in before)
        assert sum(one.size * one.busy for one in after) == pytest.approx(work, rel=0.01, abs=1e5)


def test_a_file_that_is_thinned_keeps_its_lives_and_its_newest_quarter() -> None:
    first, second = life(), life(at=900.0)
    early = [span("train", t, t + 0.5) for t in range(300)]
    late = [span("train", t, t + 0.5) for t in range(500)]
    lines = thinned([first, *early, second, *late])
    assert [line for line in lines if isinstance(line, Life)] == [first, second]
    left = [line for line in lines if isinstance(line, Span)]
    assert len(left) <= 400 and left[-200:] == late[-200:]
    assert sum(one.busy for one in left) == 800 * SECOND // 2


@pytest.mark.parametrize("times", [0, 1, 3, 6])
def test_shares_of_a_long_run_are_those_of_its_whole_timeline(tmp_path: Path, times: int) -> None:
    """Each step: a wait of 1, 2 or 3 tenths, the first two thirds of which the engine is at work
    and then the grader; then 8 tenths of training. The files were thinned so often."""
    found: dict[str, list[Life | Room | Span]] = {"trainer": [], "rollout-0": [], "grader-0": []}
    at, waited, idle = 0.0, 0.0, 0.0
    for step in range(600):
        wait = 0.1 * (1 + step % 3)
        sampled, ready, end = at + wait * 2 / 3, at + wait, at + wait + 0.8
        found["trainer"] += [span("wait", at, ready, step), span("train", ready, end, step)]
        found["rollout-0"] += [span("sample", at, sampled, step), span("wait", sampled, end)]
        found["grader-0"] += [span("wait", at, sampled), span("grade", sampled, ready, step)]
        found["grader-0"] += [span("wait", ready, end)]
        at, waited, idle = end, waited + wait, idle + 0.8
    for actor, lines in found.items():
        for _ in range(times):
            lines = thinned(lines)
        write(tmp_path, actor, life(actor), *lines)
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    work = work_of(timeline)
    assert work is not None and work.seconds == pytest.approx(at)
    share = waited / at
    assert work.parts["trainer"] == pytest.approx(1 - share, abs=1e-6)
    assert sum(work.parts.values()) == pytest.approx(1.0)
    whose = {name: work.parts.get(name, 0.0) / share for name in ("rollout", "grader")}
    assert whose == pytest.approx({"rollout": 2 / 3, "grader": 1 / 3}, abs=0.01)
    busy = {pool.pool: pool.busy for pool in work.pools}
    expected = {"trainer": 1 - share, "rollout": share * 2 / 3, "grader": share / 3}
    assert busy == pytest.approx(expected, abs=1e-4)


def test_a_torn_line_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "trainer", life(), span("train", 0, 1, 0))
    with (tmp_path / "timeline/trainer.jsonl").open("ab") as file:
        file.write(b'["train",20000')
    write(tmp_path, "trainer", life(at=110.0, incarnation=2), span("train", 0, 1, 1))
    timeline = read_timeline(tmp_path)
    assert timeline is not None and timeline.unreadable == 1
    [track] = timeline.tracks
    assert [(one.begin, one.step) for one in track.spans] == [(0, 0), (10 * SECOND, 1)]
    assert [known.incarnation for _, known in track.lives] == [1, 2]


def test_one_boot_is_aligned_by_its_clock_and_another_by_the_wall(tmp_path: Path) -> None:
    """The wall clock of the second process was set back by an hour; the third is on another host."""
    write(tmp_path, "trainer", life(), span("train", 0, 1))
    write(tmp_path, "rollout-0", life("rollout-0", 103.0, 5003.0 - 3600), span("load", 0, 1))
    write(tmp_path, "rollout-1", life("rollout-1", 7.0, 5060.0, boot="c"), span("load", 0, 1))
    timeline = read_timeline(tmp_path)
    assert timeline is not None and timeline.wall == 5000.0
    begins = {track.actor: track.spans[0].begin for track in timeline.tracks}
    assert begins == {"trainer": 0, "rollout-0": 3 * SECOND, "rollout-1": 60 * SECOND}
    assert read_timeline(tmp_path / "nowhere") is None


def made_run(run_dir: Path) -> None:
    """Ten seconds: the trainer works 4 and waits 6, of which the engine alone has 3, the engine and
    the teacher share 1, the grader has 1, and nobody has 1. Window 8 is ahead and is not waited
    for."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text('{"run_id": "r"}')
    (run_dir / "metrics.jsonl").write_text('{"step": 7, "staleness/mean": 1.5}\n')
    write(run_dir, "trainer", life(), span("wait", 0, 6, 7), span("update", 6.5, 9, 7),
          span("train", 6, 9, 7, n=900), span("publish", 9, 10, 8))  # fmt: skip
    write(run_dir, "rollout-0", life("rollout-0"), Room(8), span("sample", 0, 4, 7, "7/q/plain", 8),
          span("sample", 0, 10, 8, "8/q/plain", 4))  # fmt: skip
    write(run_dir, "teacher-0", life("teacher-0"), Room(4), span("draw", 3, 4, 7, "7/q/teacher", 4),
          span("wait", 4, 10))  # fmt: skip
    write(run_dir, "grader-0", life("grader-0"), span("wait", 0, 4),
          span("grade", 4, 5, 7, "7/q/plain/grade", 8))  # fmt: skip


def test_each_moment_of_waiting_is_laid_to_the_oldest_window(tmp_path: Path) -> None:
    made_run(tmp_path)
    with (tmp_path / "timeline/rollout-0.jsonl").open("wb") as file:  # nothing ahead: nobody works
        file.write(encoded([life("rollout-0"), Room(8), span("sample", 0, 4, 7, "7/q/plain", 8)]))
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    work = work_of(timeline)
    assert work is not None and work.seconds == 10
    expected = {"trainer": 0.4, "rollout": 0.35, "teacher": 0.05, "grader": 0.1, "controller": 0.1}
    assert work.parts == pytest.approx(expected)
    assert sentence_of(work) == (
        "Of 10 s the trainer worked 40 % and waited 60 %: 35 % for the rollout engine, "
        "10 % for the grader, 10 % for the controller, 5 % for the teacher. "
        "The bottleneck was the trainer."
    )
    assert shares_of(work) == (
        "At work: trainer 40 %; rollout 100 %, 100 % of its room; "
        "teacher 14 %, 14 % of its room; grader 20 %."
    )
    end = work_of(last(timeline, 5.0))
    assert end is not None and end.parts == pytest.approx({"trainer": 0.8, "controller": 0.2})


def test_a_clock_that_was_set_back_over_a_reboot_changes_no_share(tmp_path: Path) -> None:
    """Two lives of ten seconds, of which six were waited; the second seems to come first."""
    for told in (life(), life(wall=4970.0, boot="c")):
        write(tmp_path, "trainer", told, span("wait", 0, 6), span("train", 6, 10, 0))
    timeline = read_timeline(tmp_path)
    work = work_of(timeline) if timeline is not None else None
    assert work is not None and work.seconds == 20
    assert work.parts == pytest.approx({"trainer": 0.4, "controller": 0.6})


class Reader:
    """The rules of the trace event format, as an importer applies them."""

    def __init__(self, data: bytes) -> None:
        trace = json.loads(data)
        assert isinstance(trace["traceEvents"], list)
        self.names: dict[int, str] = {}
        self.slices: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self.counters: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
        flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for event in trace["traceEvents"]:
            assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
            assert isinstance(event["ts"], int) and isinstance(event["name"], str)
            match event["ph"]:
                case "M" if event["name"] == "process_name":
                    self.names[event["pid"]] = event["args"]["name"]
                case "M":
                    assert event["name"] in (
                        "thread_name", "thread_sort_index", "process_sort_index",
                    )  # fmt: skip
                case "X":
                    assert event["dur"] > 0
                    self.slices[event["pid"], event["tid"]].append(event)
                case "C":
                    [value] = event["args"].values()
                    self.counters[event["pid"], event["name"]].append((event["ts"], value))
                case "s" | "f":
                    flows[event["id"]].append(event)
                case "i":
                    assert event["s"] in "gpt"
                case other:
                    pytest.fail(f"unknown phase {other}")
        for slices in self.slices.values():
            self._nest(slices)
        self.arrows = [self._arrow(*pair) for pair in flows.values()]

    def _nest(self, slices: list[dict[str, Any]]) -> None:
        """Within a thread a slice lies inside of the one that is open, or after it."""
        open_until: list[int] = []
        for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])

    def _arrow(self, start: dict[str, Any], finish: dict[str, Any]) -> tuple[str, str]:
        assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e")
        assert start["ts"] < finish["ts"] and start["name"] == finish["name"]
        return self._around(start), self._around(finish)

    def _around(self, flow: dict[str, Any]) -> str:
        [name] = [
            event["name"]
            for event in self.slices[flow["pid"], flow["tid"]]
            if event["ts"] <= flow["ts"] < event["ts"] + event["dur"]
        ]
        return f"{self.names[flow['pid']]}: {name}"


def test_the_trace_keeps_the_rules_of_its_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"trace: {tmp_path}/timeline/trace.json"
    trace = Reader((tmp_path / "timeline/trace.json").read_bytes())
    assert trace.arrows == [
        ("rollout-0: sample", "grader-0: grade"),
        ("grader-0: grade", "trainer: train"),
    ]
    pids = {name: pid for pid, name in trace.names.items()}
    assert [*pids] == ["trainer", "rollout-0", "teacher-0", "grader-0"]
    hands = trace.counters[pids["rollout-0"], "sequences in hand"]
    assert hands == [(0, 12), (4 * SECOND, 4), (10 * SECOND, 0)]
    assert trace.counters[pids["trainer"], "staleness, versions"] == [(9 * SECOND, 1.5)]


@settings(max_examples=25, deadline=None)
@given(spans)
def test_jobs_at_once_never_overlap_in_a_thread(found: list[Span]) -> None:
    track = Track("rollout-0", [(0, life("rollout-0"))], sorted(found, key=lambda s: s.begin), 8)
    trace = chrome_trace(Timeline([track], 0.0, 0, 10**8), {}, {})
    reader = Reader(msgspec.json.encode(trace))
    assert sum(map(len, reader.slices.values())) == len(found)


def test_a_run_without_a_timeline_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: has no timeline (the folder timeline/ is missing or empty); expected a run "
        "whose processes have begun, of a version that records one\n"
    )
    assert main([str(tmp_path), "--last", "0"]) == 2
    assert "'0' is not a number of seconds above 0" in capsys.readouterr().err


def test_a_line_that_is_no_line_is_counted() -> None:
    assert decoded(b'[1]\n{"type":"life"}\n\xff\n\n') == ([], 3)


def test_the_ids_of_tasks_are_read_as_the_scheduler_makes_them() -> None:
    question = questions(1)[0]
    for kind, window in ((PLAIN, 12), (TEACHER, 12), (EVALUATE, -1)):
        group = Group(id=f"12/{question.id}/{kind}", kind=kind, prompt=Prompt(messages=[]))
        asked = {"group": group, "question": question}
        sampled, graded = SampleTarget(**asked), GradeTarget(**asked)
        judged = JudgeTarget(**asked, response=3)
        for target in (sampled, graded, judged):
            assert window_of(target.task_id) == window
        assert graded.task_id.removesuffix(GRADING) == sampled.task_id != graded.task_id
        assert (graded.kind, judged.kind) == (GRADE, OF_TASKS[JUDGE])
        assert (sampled.kind in OF_TASKS) == (kind != PLAIN)
    assert window_of("") == -1
