"""The advisor: what it tells, when it ends a run, and what it leaves to another life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from worlds import topology

from zppo_actors.controller.advisor import Advisor
from zppo_actors.process import ActorContext

HEALTHY = {"train/updates": 2, "tasks/answered/teacher": 9}
SILENT = {"train/updates": 2, "tasks/given_up/teacher": 4}
STILL = {"train/updates": 0, "tasks/answered/teacher": 9}


class Events:
    """In the place of the recorder: keeps what was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def event(self, actor: str, event: str, detail: str = "") -> None:
        self.told.append((event, detail.partition(":")[0]))


class Judged:
    """An advisor on a run whose settings are given; `steps` feeds it and keeps its reasons."""

    def __init__(self, folder: Path, first_window: int = 0, **run: Any) -> None:
        self.events = Events()
        context = ActorContext(
            run_dir=folder, runtime=folder, actor="controller", role="controller", incarnation=0,
            topology=topology(run=run), run_id="run", start_version=first_window,
        )  # fmt: skip
        self.advisor = Advisor(context, self.events, first_window)  # type: ignore[arg-type]
        self.reasons: list[str | None] = []
        self.next = first_window

    def steps(self, count: int, line: dict[str, Any], *, last: bool = False) -> None:
        for _ in range(count):
            self.reasons.append(self.advisor.step({"step": self.next, **line}, last=last))
            self.next += 1


SILENCE = (
    "teacher answered none of its 12 tasks in 3 windows in a row (run.silent_teacher_windows: 3; 0 "
    "goes on without it); see logs/teacher-0.log"
)


def test_a_silent_teacher_ends_the_run_at_its_third_window(tmp_path: Path) -> None:
    judged = Judged(tmp_path)
    judged.steps(2, SILENT)
    judged.steps(1, HEALTHY)
    judged.steps(3, SILENT)
    assert judged.reasons == [None] * 5 + [SILENCE]


def test_zero_lets_the_run_go_on_without_its_teacher(tmp_path: Path) -> None:
    judged = Judged(tmp_path, silent_teacher_windows=0)
    judged.steps(20, SILENT)
    assert judged.reasons == [None] * 20
    assert judged.advisor.remark == ", but with severe advice: teacher_silent (zppo doctor)"


def test_windows_of_an_earlier_life_do_not_end_this_one(tmp_path: Path) -> None:
    """They were opened while the teacher was silent, and say nothing of it now."""
    lines = [msgspec.json.encode({"step": step, **SILENT}) + b"\n" for step in range(9)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    judged = Judged(tmp_path, first_window=11)
    judged.next = 9
    judged.steps(4, SILENT)
    assert judged.reasons == [None] * 4
    judged.steps(1, SILENT)
    assert judged.reasons[-1] == SILENCE


def test_severe_advice_ends_the_run_only_where_it_may(tmp_path: Path) -> None:
    warned, stopped = Judged(tmp_path), Judged(tmp_path, on_advice="stop")
    for judged in (warned, stopped):
        judged.steps(5, STILL)
    assert warned.reasons == [None] * 5
    assert stopped.reasons[:4] == [None] * 4
    assert str(stopped.reasons[4]).startswith("severe no_gradient: no optimizer update was made")


def test_warnings_end_no_run(tmp_path: Path) -> None:
    judged = Judged(tmp_path, on_advice="stop")
    judged.steps(12, {**HEALTHY, "time/rollout_idle": 0.95})
    assert judged.reasons == [None] * 12
    assert [line.split(":")[0] for line in judged.advisor.lines] == ["warning engines_idle"]
    assert judged.advisor.remark == ""


def test_a_finding_is_told_when_it_comes_grows_and_goes(tmp_path: Path) -> None:
    judged = Judged(tmp_path, silent_teacher_windows=0)
    judged.steps(6, SILENT)
    judged.steps(2, HEALTHY)
    assert judged.events.told == [
        ("advice", "warning teacher_silent"),
        ("advice", "severe teacher_silent"),
        ("advice_gone", "teacher_silent"),
    ]


def test_a_run_shorter_than_the_rules_look_is_judged_at_its_end(tmp_path: Path) -> None:
    judged = Judged(tmp_path)
    judged.steps(1, STILL)
    assert judged.advisor.remark == ""
    judged.steps(1, STILL, last=True)
    assert judged.advisor.remark == ", but with severe advice: no_gradient (zppo doctor)"
