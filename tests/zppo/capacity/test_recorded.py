"""A calibration read off a run whose speeds and questions are known, because it was simulated."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from recorded_worlds import Recording
from worlds import topology

from zppo.capacity.engine_curve import EngineRecord, Job, _points_of, engines_of
from zppo.capacity.recorded import Recorded, read_recorded
from zppo.errors import UserError
from zppo.records.timeline import MICRO, TRAIN, Life, Line, Span, decoded, encoded, thinned
from zppo.simulation import (
    Accuracies,
    Curve,
    Engines,
    Graders,
    Lengths,
    Speeds,
    TrainerSpeed,
    World,
    simulate,
)

STEPS, WARM = 12, 4
TOPOLOGY = topology(
    scheduler={"max_staleness": 2, "new_questions": 12},
    student={"model": "student", "sampling": {"max_new_tokens": 1000}},
    actors={"rollout": {"count": 2}, "teacher": {"count": 1}, "grader": {"count": 2}},
)
WORLD = World(
    topology=TOPOLOGY,
    speeds=Speeds(
        rollout=Engines(
            slots=64,
            curve=Curve(fixed=0.01, per_sequence=0.0005),
            load_seconds=0.2,
            prompt_steps=3.0,
        ),
        teachers=(
            Engines(slots=32, curve=Curve(fixed=0.02, per_sequence=0.001), prompt_steps=5.0),
        ),
        trainer=TrainerSpeed(fixed=0.5, tokens_per_second=5e3, publish_seconds=0.1),
        grader=Graders(seconds=0.01),
    ),
    lengths=Lengths(median=100.0, p99_ratio=8.0, cap=1000, of_question=0.5),
    lengths_of={"compress": Lengths(values=(40,))},
    accuracies=Accuracies(alpha=0.6, beta=1.2, teacher=0.8, reformulated=0.25),
    prompt_tokens=50,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recording = Recording(WORLD, STEPS)
    recording.run(WARM)
    return recording.write(tmp_path_factory.mktemp("runs") / "run", TOPOLOGY)


@pytest.fixture(scope="module")
def recorded(run: Path) -> Recorded:
    return read_recorded(run)


def test_trainer_graders_and_loads_are_what_they_were(recorded: Recorded) -> None:
    speeds = recorded.calibration.speeds
    assert speeds.trainer.fixed == pytest.approx(0.5, abs=1e-3)
    assert speeds.trainer.tokens_per_second == pytest.approx(5e3, rel=1e-3)
    assert speeds.trainer.publish_seconds == pytest.approx(0.1, abs=1e-3)
    assert speeds.grader.seconds == pytest.approx(0.01, abs=1e-4)
    assert speeds.rollout.load_seconds == pytest.approx(0.2, abs=1e-3)
    assert (speeds.rollout.slots, speeds.teachers[0].slots) == (64, 32)


@pytest.mark.parametrize("pool", ["rollout", "teacher"])
def test_the_curve_of_an_engine_is_found_within_a_fifth(recorded: Recorded, pool: str) -> None:
    found, true = (
        speeds.rollout if pool == "rollout" else speeds.teachers[0]
        for speeds in (recorded.calibration.speeds, WORLD.speeds)
    )
    seconds = [seconds for _, seconds in found.curve.points]
    assert seconds == sorted(seconds) and len(seconds) >= 4
    for running in (true.slots // 8, true.slots // 4, true.slots // 2, true.slots):
        assert found.curve.seconds(running) == pytest.approx(true.curve.seconds(running), rel=0.2)
    assert found.prompt_steps == pytest.approx(true.prompt_steps, abs=10.0)


def test_questions_are_like_those_of_the_run(recorded: Recorded) -> None:
    calibration = recorded.calibration
    law = calibration.lengths
    assert np.median(law.values) == pytest.approx(100, rel=0.15)
    assert law.of_question == pytest.approx(0.5, abs=0.12)
    assert calibration.lengths_of["compress"].values == (40,)
    assert {"bcq", "ncq", "teacher"} <= calibration.lengths_of.keys()
    accuracies = calibration.accuracies
    mean = accuracies.alpha / (accuracies.alpha + accuracies.beta)
    assert mean == pytest.approx(1 / 3, abs=0.1)
    assert accuracies.teacher == pytest.approx(0.8, abs=0.1)
    assert accuracies.reformulated == pytest.approx(0.25, abs=0.1)
    assert calibration.prompt_tokens == 50
    assert calibration.settings["student.sampling.max_new_tokens"] == 1000


@pytest.mark.slow
def test_a_replay_takes_as_long_as_the_run(recorded: Recorded) -> None:
    """Within 10 %, or what three seeds differ by: a short run with long responses is a draw."""
    replay = World.of(recorded.topology, recorded.calibration)
    replays, real = (
        [simulate(one, STEPS, seed, WARM).seconds_per_step for seed in (1, 2, 3)]
        for one in (replay, WORLD)
    )
    assert recorded.warm == WARM
    assert abs(fmean(replays) - fmean(real)) < max(0.1 * fmean(real), max(real) - min(real))


PAIRS = topology(
    scheduler={"max_staleness": 1, "new_questions": 4, "rho_replay": 0.25, "rho_aug": 0.25},
    method={"group_size": 4},
    student={"model": "student", "sampling": {"max_new_tokens": 48}},
    teacher={"model": "teacher", "sampling": {"max_new_tokens": 48}, "compression": "rule"},
    actors={"rollout": {"count": 1}, "teacher": {"count": 1}, "grader": {"count": 1}},
)
SLOW = World(
    topology=PAIRS,
    speeds=Speeds(
        rollout=Engines(
            slots=96,
            curve=Curve(fixed=0.12, per_sequence=0.01),
            load_seconds=0.28,
            prompt_steps=3.9,
        ),
        teachers=(
            Engines(slots=32, curve=Curve(fixed=0.09, per_sequence=0.006), prompt_steps=20.0),
        ),
        trainer=TrainerSpeed(fixed=7.4, tokens_per_second=328.0, publish_seconds=0.54),
    ),
    lengths=Lengths(median=25.0, p99_ratio=2.0, cap=48),
    accuracies=Accuracies(alpha=0.22, beta=0.57, teacher=0.16, reformulated=0.17),
    prompt_tokens=85,
)
"""As a run of SmolLM2 was read (docs/plan.md): bound 1 and windows that wait for their teacher, so
that a slow step and a quick one take turns."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_replay_of_steps_in_pairs_takes_as_long_as_the_run(tmp_path: Path, seed: int) -> None:
    recording = Recording(SLOW, 11, seed)
    recording.run(3)
    found = read_recorded(recording.write(tmp_path / "run", PAIRS))
    replay = World.of(found.topology, found.calibration)
    replays = [simulate(replay, found.steps, one, found.warm).seconds_per_step for one in (1, 2, 3)]
    assert fmean(replays) == pytest.approx(found.seconds_per_step, rel=0.1)


@given(
    st.lists(st.tuples(st.floats(0.01, 100.0), st.floats(1e-3, 1e3)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_more_sequences_make_no_step_shorter_and_no_token_dearer(
    found: list[tuple[float, float]], rng: random.Random
) -> None:
    running = np.array(sorted(rng.sample(range(1, 99), len(found))), float)
    rates, weights = np.array(found).T
    points = _points_of(running, rates, weights)
    assert [n for n, _ in points] == running.tolist()
    for (few, before), (many, after) in pairwise(points):
        assert after >= before * (1 - 1e-6) - 1e-9
        assert after / many <= before / few * (1 + 1e-6) + 1e-9


def test_a_curve_in_order_stays_as_it_is() -> None:
    running, weights = np.array([1.0, 8.0, 32.0]), np.array([1.0, 9.0, 0.1])
    seconds = 0.1 + 0.01 * running
    found = _points_of(running, 1.0 / seconds, weights)
    assert found == ((1, 0.11), (8, 0.18), (32, 0.42))


def test_a_response_ends_after_its_prompt() -> None:
    """Short responses after long prompts: of 20 + 10 and 20 + 30 token steps the first ends after
    three fifths of the time, not after a third."""
    line = Curve(fixed=0.1, per_sequence=0.02)
    jobs, now = [], 0.0
    for alone in (False, True, False, True, False):
        lengths = (30,) if alone else (10, 30)
        both = 0 if alone else 20 + 10
        end = now + both * line.seconds(2) + (20 + 30 - both) * line.seconds(1)
        jobs.append(Job(now, end, 1.0, lengths))
        jobs.append(Job(end + 1.0, end + 1.0 + 25 * line.seconds(1), 1.0, (5,)))
        now = end + 20.0
    found = engines_of([EngineRecord(jobs, [])], 8, 0.0)
    assert found is not None and found.prompt_steps == pytest.approx(20.0, rel=0.03)
    for running in (1, 2):
        assert found.curve.seconds(running) == pytest.approx(line.seconds(running), rel=0.02)


def test_what_was_merged_or_is_torn_is_left_out(run: Path, tmp_path: Path) -> None:
    """A long timeline: its early spans are merged, its last line is half a line."""
    copied = _copy(run, tmp_path)
    for name in ("rollout-0", "rollout-1"):
        file = copied / "timeline" / f"{name}.jsonl"
        lines, _ = decoded(file.read_bytes())
        file.write_bytes(encoded(thinned(lines)) + b'["sample",12')
    found = read_recorded(copied).calibration.speeds.rollout.curve
    for running in (8, 16, 32):
        true = WORLD.speeds.rollout.curve.seconds(running)
        assert found.seconds(running) == pytest.approx(true, rel=0.35)


def test_the_start_of_a_further_attempt_is_no_step(
    run: Path, recorded: Recorded, tmp_path: Path
) -> None:
    """A run that was killed before step 8 and took a minute to go on."""
    copied, step = _copy(run, tmp_path), 8
    file = copied / "timeline" / "trainer.jsonl"
    [life, *spans], _ = decoded(file.read_bytes())
    assert isinstance(life, Life)
    before = [s for s in spans if isinstance(s, Span) and s.begin < _of_step(spans, step).begin]
    after = [s for s in spans if isinstance(s, Span) and s not in before]
    late = [replace(s, begin=s.begin - before[-1].end, end=s.end - before[-1].end) for s in after]
    started = life.monotonic + before[-1].end / MICRO
    again = replace(
        life, run_id="again", monotonic=started, wall=life.wall + before[-1].end / MICRO
    )
    file.write_bytes(encoded([life, *before, again, *late]))
    metrics = copied / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[step]["time/step"] += 60.0
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    others = [line["time/step"] for line in lines[WARM:] if line["step"] != step]
    found = read_recorded(copied)
    assert found.seconds_per_step == pytest.approx(fmean(others))
    assert found.calibration.speeds.trainer == recorded.calibration.speeds.trainer


def _of_step(spans: Iterable[Line], step: int) -> Span:
    return next(s for s in spans if isinstance(s, Span) and s.kind == TRAIN and s.step == step)


def _copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def _no_timeline(run: Path) -> None:
    shutil.rmtree(run / "timeline")


def _no_rollouts(run: Path) -> None:
    shutil.rmtree(run / "rollouts")


def _few_steps(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))


def _silent_teacher(run: Path) -> None:
    (run / "timeline" / "teacher-0.jsonl").unlink()


def _no_run(run: Path) -> None:
    (run / "run.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            _no_timeline,
            "--from-run: 'RUN' has no timeline (the folder timeline/ is missing or empty); "
            "expected a run of a version that records one: repeat some steps of it",
        ),
        (
            _no_rollouts,
            "--from-run: 'RUN' has no rollouts with lengths; expected a run with sinks.rollouts: "
            "true",
        ),
        (
            _few_steps,
            "--from-run: 'RUN' has 3 trained steps; expected at least 6, so launch it with a "
            "larger run.steps",
        ),
        (
            _silent_teacher,
            "--from-run: the timeline of 'RUN' has no job of the pool 'teacher' whose lengths are "
            "known; write its speeds by hand (docs/plan.md) and give them with --calibration",
        ),
        (_no_run, "RUN: is not the directory of a run (it has no run.json)"),
    ],
)
def test_a_run_that_does_not_tell_enough(
    damage: Callable[[Path], None], sentence: str, run: Path, tmp_path: Path
) -> None:
    copied = _copy(run, tmp_path)
    damage(copied)
    with pytest.raises(UserError) as told:
        read_recorded(copied)
    assert str(told.value).replace(str(copied), "RUN") == sentence


@pytest.mark.parametrize(
    "record",
    [
        EngineRecord([Job(0.0, 1.0, 2, (3, 4))], [(0.0, 1.0)]),
        EngineRecord([Job(0.0, 1.0, 2, (0, 0))], []),
    ],
    ids=["while weights were loaded", "empty responses"],
)
def test_an_engine_that_was_never_seen_to_run_has_no_speed(record: EngineRecord) -> None:
    assert engines_of([record], 8, 0.0) is None
