"""`zppo plan`: the plan of `--dry-run`, then times from measured speeds or none at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs
from recorded_worlds import Recording

from zppo import launch, plan_command
from zppo.capacity.calibration_file import read_calibration
from zppo.config.load import load
from zppo.errors import UserError
from zppo.simulation import Accuracies, World

SPEEDS = """
speeds:
  rollout: {slots: 16, curve: {fixed: 0.01}}
  teachers: [{slots: 16, curve: {fixed: 0.01}}]
  trainer: {fixed: 7200.0, tokens_per_second: 1.0e+9}
lengths: {median: 4}
"""


@pytest.mark.slow
def test_the_plan_is_that_of_a_dry_run_and_times_follow(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert launch.main(["topology.yaml", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert plan_command.main(["topology.yaml"]) == 0
    assert capsys.readouterr().out == dry + f"note: {plan_command.WITHOUT}\n"
    (small / "speeds.yaml").write_text(SPEEDS)
    order = ["topology.yaml", "--calibration", "speeds.yaml", "--seconds", "1"]
    assert plan_command.main(order) == 0
    out = capsys.readouterr().out
    assert out.startswith(dry)
    own = next(line for line in out.splitlines() if "(this run)" in line)
    # Three steps of a trainer that takes two hours, and engines that take next to nothing.
    cells = [cell.strip() for cell in own.split("│")[1:-1]]
    assert cells[2:5] == ["7.2e+03", "6", "trainer"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "--calibration: cannot read 'speeds.yaml': No such file or directory\n"),
        (
            SPEEDS.replace("  teachers: [{slots: 16, curve: {fixed: 0.01}}]\n", ""),
            "--calibration speeds.yaml: speeds.teachers is missing; expected those of the topology's "
            "teachers, because the method asks them\n",
        ),
        (
            SPEEDS.replace("rollout: {slots: 16", "rollout: {slots: 4"),
            "--calibration speeds.yaml: speeds.rollout.slots is 4; expected at least 8, "
            "method.group_size, because an engine samples a group at once\n",
        ),
        (
            SPEEDS.replace("teachers: [{slots: 16", "teachers: [{slots: 1"),
            "--calibration speeds.yaml: speeds.teachers[0].slots is 1; expected at least 4, "
            "method.teacher_group_size, because an engine samples a group at once\n",
        ),
        (
            SPEEDS.replace("slots: 16, curve", "slot: 16, curve", 1),
            "--calibration: 'speeds.yaml' is not a calibration: Object contains unknown field "
            "`slot` - at `$.speeds.rollout`; see docs/plan.md\n",
        ),
    ],
)
def test_mistakes(
    text: str | None, sentence: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (small / "speeds.yaml").write_text(text)
    assert plan_command.main(["topology.yaml", "--calibration", "speeds.yaml"]) == 2
    assert capsys.readouterr().err == sentence


NO_CURVE = (
    "a curve needs points: [[running sequences, seconds], …], or fixed and per_sequence, of which "
    "one is above 0; not both"
)
DISORDER = (
    "points: {} is followed by {}; list each number of running sequences once, in ascending order"
)
MEASURED = f"""
settings: {{student.dtype: float16}}
{SPEEDS}"""


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        ("{points: []}", NO_CURVE),
        ("{}", NO_CURVE),
        ("{points: [[1, 0.1]], fixed: 0.1}", NO_CURVE),
        ("{points: [[1, 0.1], [1, 0.2]]}", DISORDER.format(1, 1)),
        ("{points: [[1, 0.1], [8, 0.2], [4, 0.3]]}", DISORDER.format(8, 4)),
    ],
)
def test_a_curve_that_is_none_is_refused(curve: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "speeds.yaml"
    file.write_text(
        f"speeds: {{rollout: {{slots: 8, curve: {curve}}}, trainer: {{tokens_per_second: 9.0}}}}\n"
        "lengths: {median: 10.0}\n"
    )
    with pytest.raises(UserError) as told:
        read_calibration(file)
    assert str(told.value) == (
        f"--calibration: {str(file)!r} is not a calibration: {reason} - at "
        "`$.speeds.rollout.curve`; see docs/plan.md"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--calibration", "of_others.yaml"],
            "--calibration of_others.yaml: was measured with student.dtype 'float16', and here it "
            "is 'bfloat16'; measure again with --calibrate, or name a run of this topology with "
            "--from-run\n",
        ),
        (
            ["--calibration", "negative.yaml"],
            "--calibration: 'negative.yaml' is not a calibration: Expected `float` > 0.0 - at "
            "`$.speeds.trainer.tokens_per_second`; see docs/plan.md\n",
        ),
        (
            ["--calibration", "speeds.yaml", "--from-run", "run"],
            "zppo plan: --calibration and --from-run are given; expected one of them\n",
        ),
        (
            ["--calibration", "speeds.yaml", "--within", "9"],
            "--within: limits --calibrate, which is not given; leave it out\n",
        ),
        (
            ["--seconds", "9"],
            "--seconds: there is nothing to search with; how long a step takes is not said without "
            "measured speeds: --from-run RUN, --calibrate or --calibration FILE\n",
        ),
        (
            ["--write", "new.yaml"],
            "--write: there is nothing to write; expected --from-run RUN or --calibrate with it\n",
        ),
        (
            ["--from-run", "run", "--write", "speeds.yaml"],
            "--write: 'speeds.yaml' exists already; name another file, or remove it\n",
        ),
        (
            ["--from-run", "run", "--write", "absent/new.yaml"],
            "--write: there is no folder 'absent'; make it first\n",
        ),
        (["--from-run", "run"], "run: no such folder; expected the directory of a run\n"),
        (
            ["--seconds", "0"],
            "zppo plan: argument --seconds: '0' is not a number of seconds above 0, at most 1e9; "
            "see zppo plan --help\n",
        ),
    ],
)
def test_mistakes_about_speeds(
    arguments: list[str], sentence: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "speeds.yaml").write_text(SPEEDS)
    (small / "of_others.yaml").write_text(MEASURED)
    (small / "negative.yaml").write_text(SPEEDS.replace("1.0e+9", "-1.0"))
    before = sorted(small.iterdir())
    assert plan_command.main(["topology.yaml", *arguments]) == 2
    assert capsys.readouterr() == ("", sentence)
    assert sorted(small.iterdir()) == before


@pytest.mark.slow
def test_a_recorded_run_is_read_written_and_planned_with(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers come from the run and from the file that was written from it."""
    topology = load(small / "topology.yaml", [])
    world = read_world(small)
    recording = Recording(world, 8)
    recording.run(4)
    run = recording.write(small / "recorded", topology)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    order = ["topology.yaml", "--seconds", "1e5", "--json"]
    assert plan_command.main([*order, "--from-run", str(run), "--write", "new.yaml"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert plan_command.main([*order, "--calibration", "new.yaml"]) == 0
    second = json.loads(capsys.readouterr().out)
    times = first["times"]
    assert times.pop("source") == f"--from-run {run}"
    assert times["replay"]["simulated"] == pytest.approx(times["replay"]["recorded"], rel=0.3)
    assert {**times, "replay": None, "source": "--calibration new.yaml"} == second["times"]
    assert first["processes"][1]["name"] == "trainer" and first["steps"] == 3
    given, best = times["given"], times["best"]["expected"]
    assert given["engines"] == {"rollout": 1, "teacher": 1} and given["memory"]["host"] > 0
    assert best["seconds_per_step"] <= given["seconds_per_step"] * 1.05
    assert not times["ended_early"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def read_world(folder: Path) -> World:
    """Questions that are answered half of the time, on engines in which one of them has room."""
    (folder / "known.yaml").write_text(SPEEDS.replace("7200.0", "0.5"))
    known = read_calibration(folder / "known.yaml")
    known = structs.replace(known, accuracies=Accuracies(values=(0.25, 0.75)))
    return World.of(load(folder / "topology.yaml", []), known)
