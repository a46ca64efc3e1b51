from __future__ import annotations

from pathlib import Path

import pytest

from zppo.algorithm.steps import Fate
from zppo.algorithm.window import Window
from zppo.config.sinks import SinksConfig
from zppo.records.summary import read_lines
from zppo.scheduling.events import Trained
from zppo.scheduling.heldout import EvaluationResult
from zppo_actors.controller.sinks import LineSink, MetricSinks


def chosen(rollouts: bool = True) -> SinksConfig:
    return SinksConfig(tensorboard=False, rollouts=rollouts)


def evaluation(step: int) -> EvaluationResult:
    return EvaluationResult(
        step=step, newest_version=step, accuracy=0.5, low=0.4, high=0.6, questions=10, samples=40
    )


def fate(name: str, question_id: str = "q") -> Fate:
    return Fate(question_id=question_id, fate=name, entry_accuracy=0.25, visits=2)  # type: ignore[arg-type]


def trained(step: int) -> Trained:
    """A step that trained nothing."""
    window = Window(index=step, visits=[])
    return Trained(window=window, composed=[], tokens=0, fates=[], settled=[step])


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_carries_its_step_and_times(tmp_path: Path) -> None:
    clock = Clock()
    sinks = MetricSinks(tmp_path, chosen(), clock=clock)
    clock.now += 2.0
    sinks.write(0, {"accuracy/plain": 0.25})
    clock.now += 0.5
    line = sinks.write(1, {"accuracy/plain": 0.5})
    sinks.close()
    assert line == {"step": 1, "wall_seconds": 2.5, "time/step": 0.5, "accuracy/plain": 0.5}
    assert read_lines(tmp_path / "metrics.jsonl")[1] == line


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    sinks = MetricSinks(tmp_path, chosen())
    sinks.write(0, {})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]
    sinks.close()


def test_resume_cuts_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    clock = Clock()
    sinks = MetricSinks(tmp_path, chosen(), clock=clock)
    for step in range(4):
        clock.now += 1.0
        sinks.write_heldout(evaluation(step))
        sinks.write(step, {})
        sinks.write_fate(step, [fate("admitted")])
        sinks.write_rollouts(step, trained(step))
    sinks.close()
    clock.now += 1000.0
    sinks = MetricSinks(tmp_path, chosen(), resume_step=2, clock=clock)
    clock.now += 1.0
    line = sinks.write(2, {})
    sinks.close()
    assert line["wall_seconds"] == 3.0
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in read_lines(tmp_path / "fates.jsonl")] == [0, 1]
    assert [line["step"] for line in read_lines(tmp_path / "heldout.jsonl")] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step-000000.parquet",
        "step-000001.parquet",
    ]


def test_a_torn_line_is_mended_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1,"accu')
    sink = LineSink(path)
    sink.write({"step": 1})
    sink.close()
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'


def test_a_crash_while_cutting_keeps_the_old_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1}\n')

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        LineSink(path, lambda line: line["step"] < 1)
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'


def test_only_fates_that_changed_the_buffer_have_a_line(tmp_path: Path) -> None:
    sinks = MetricSinks(tmp_path, chosen())
    sinks.write_fate(
        7, [fate("admitted", "a"), fate("kept", "b"), fate("none", "c"), fate("evicted", "d")]
    )
    sinks.close()
    lines = read_lines(tmp_path / "fates.jsonl")
    assert [line["question_id"] for line in lines] == ["a", "d"]
    assert lines[0] == {
        "step": 7,
        "question_id": "a",
        "fate": "admitted",
        "entry_accuracy": 0.25,
        "visits": 2,
    }


def test_a_rollout_store_that_is_off_is_not_written(tmp_path: Path) -> None:
    sinks = MetricSinks(tmp_path, chosen(rollouts=False))
    sinks.write(0, {})
    sinks.write_rollouts(0, trained(0))
    sinks.close()
    assert not (tmp_path / "rollouts").exists()
