from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from zppo.cli import main
from zppo.diagnosis.doctor import report_lines
from zppo.diagnosis.examine import diagnosed
from zppo.diagnosis.rules import RULES

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text('{"run_id": "ab", "topology": {"method": {"name": "grpo"}}}')
    return tmp_path


def write_steps(run_dir: Path, steps: int, **values: float) -> None:
    line = {name.replace("__", "/"): value for name, value in values.items()}
    lines = [msgspec.json.encode({"step": step, **line}) + b"\n" for step in range(steps)]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines))


def test_a_severe_finding_is_exit_code_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_steps(run_dir, 8, train__updates=0)
    assert main(["doctor", str(run_dir)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "run ab: 8 trained steps, 1 advisory",
        "severe no_gradient: no optimizer update was made in the last 5 steps",
        "  the student does not change; look at the other advice, data.train and method.group_size",
        "  settings: data.train, method.group_size",
    ]


def test_warnings_and_health_are_exit_code_0(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(run_dir, 12, train__updates=2, time__rollout_idle=0.95)
    assert main(["doctor", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["run"], report["steps"], report["verdict"]) == ("ab", 12, None)
    [advisory] = report["advice"]
    assert (advisory["rule"], advisory["severity"]) == ("engines_idle", "warning")
    assert advisory["numbers"] == {"time/rollout_idle": pytest.approx(0.95)}
    write_steps(run_dir, 1, train__updates=2)
    assert main(["doctor", str(run_dir)]) == 0
    assert capsys.readouterr().out == "run ab: 1 trained step, no advisories\n"


def test_what_is_no_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path / 'none'}: no such folder; expected the directory of a run\n"
    )


def test_the_help_says_which_code_is_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "1 if an advisory is severe" in " ".join(capsys.readouterr().out.split())


def test_the_setting_of_the_run_decides_about_silence(run_dir: Path) -> None:
    def severity(windows: int) -> str:
        record = {"run_id": "ab", "topology": {"run": {"silent_teacher_windows": windows}}}
        (run_dir / "run.json").write_bytes(msgspec.json.encode(record))
        return str(diagnosed(run_dir)["advice"][0]["severity"])

    write_steps(run_dir, 5, tasks__answered__teacher=0, tasks__given_up__teacher=4)
    assert (severity(5), severity(6)) == ("severe", "warning")


@pytest.mark.slow
def test_a_made_up_healthy_run_has_no_severe_finding(fake_run: Callable[..., Path]) -> None:
    summary = diagnosed(fake_run(steps=12))
    assert [a for a in summary["advice"] if a["severity"] == "severe"] == []
    assert next(report_lines(summary)).startswith(f"run {summary['run']}: 12 trained steps, ")


def test_the_documentation_has_every_rule() -> None:
    text = DOCS.read_text("utf-8")
    assert [rule for rule in RULES if f"| `{rule}` |" not in text] == []
