"""`zppo plan`: the plan of `--dry-run`, then times from measured speeds or none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from zppo import launch, plan_command

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
    assert plan_command.main(["topology.yaml", "--calibration", "speeds.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(dry)
    own = next(line for line in out.splitlines() if "(this run)" in line)
    # Three steps of a trainer that takes two hours, and engines that take next to nothing.
    cells = [cell.strip() for cell in own.split("│")[1:-1]]
    assert cells[1:4] == ["7.2e+03", "6", "trainer"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "--calibration: cannot read 'speeds.yaml': No such file or directory\n"),
        (
            SPEEDS.replace("  teachers: [{slots: 16, curve: {fixed: 0.01}}]\n", ""),
            "--calibration: 'speeds.yaml' has no speeds.teachers; expected those of the topology's "
            "teachers, because the method asks them\n",
        ),
        (
            SPEEDS.replace("rollout: {slots: 16", "rollout: {slots: 4"),
            "--calibration: speeds.rollout.slots is 4 in 'speeds.yaml'; expected at least 8, "
            "method.group_size, because an engine samples a group at once\n",
        ),
        (
            SPEEDS.replace("teachers: [{slots: 16", "teachers: [{slots: 1"),
            "--calibration: speeds.teachers[0].slots is 1 in 'speeds.yaml'; expected at least 4, "
            "method.teacher_group_size, because an engine samples a group at once\n",
        ),
        (
            SPEEDS.replace("slots: 16, curve", "slot: 16, curve", 1),
            "--calibration: 'speeds.yaml' is not a calibration: Object contains unknown field "
            "`slot` - at `$.speeds.rollout`\n",
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
