"""`zppo plan --calibrate` with the real engines and the real trainer of the quickstart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from worlds import topology

from zppo import plan_command
from zppo.capacity.calibration_file import read_calibration
from zppo.capacity.measuring import calibration_folder
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.simulation import Accuracies
from zppo.training.state import build_trainer
from zppo_actors import runtime
from zppo_actors.calibrator.process import published
from zppo_actors.calibrator.training import Windows

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")
STUDENT = str(ROOT / "examples" / "quickstart" / "student")
SMALL = [
    *("--set", "scheduler.new_questions=4", "--seconds", "20"),  # of which little is used
    *("--set", "actors.rollout.engine_args.max_sequences=16"),
    *("--set", "actors.teacher.engine_args.max_sequences=8"),
]
PATIENCE = 600


@pytest.mark.slow
def test_engines_and_trainer_are_measured_and_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    order = [QUICKSTART, *SMALL, "--calibrate", "--within", str(PATIENCE)]
    assert plan_command.main([*order, "--write", "speeds.yaml", "--json"]) == 0
    times = json.loads(capsys.readouterr().out)["times"]
    assert times["given"]["seconds_per_step"] > 0.0 and times["replay"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["speeds.yaml"]
    found = read_calibration(tmp_path / "speeds.yaml")
    speeds = found.speeds
    assert speeds.rollout.slots == 16 and [one.slots for one in speeds.teachers] == [8]
    few, many = (speeds.rollout.curve.seconds(n) for n in (1, 16))
    assert few > 0.0 and many >= few
    assert speeds.rollout.load_seconds > 0.0 and speeds.trainer.publish_seconds > 0.0
    # The student of the quickstart answers in 15 to 24 tokens and is right half of the time.
    assert min(found.lengths.values) >= 8 and max(found.lengths.values) <= 24
    assert found.accuracies.teacher > 0.8
    assert found.settings["student.sampling.max_new_tokens"] == 24


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--calibrate", "--within", "0.1"],
            "--calibrate: was not done within 0.1 s, while starting; give it more with --within\n",
        ),
        (
            [
                *("--calibrate", "--set", "actors.teacher.engine=openai", "--offline", "--set"),
                "actors.teacher.engine_args={base_url: http://127.0.0.1:9/v1}",
            ],
            "--calibrate: teacher is behind a server, which is not asked for a measurement; write "
            "its speeds by hand (docs/plan.md), or use --from-run\n",
        ),
        (
            ["--calibrate", "--set", "actors.trainer.ranks=2"],
            "--calibrate: measures a trainer of one rank, and here it has 2; write its speed by hand "
            "(docs/plan.md), or use --from-run\n",
        ),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.main([QUICKSTART, *arguments]) == 2
    assert capsys.readouterr() == ("", sentence)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_named(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder looks like a model, and the plan reads no weights."""
    assert plan_command.main(["topology.yaml", "--calibrate", "--within", str(PATIENCE)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "student" in error


@pytest.mark.slow
def test_ctrl_c_ends_everything(runtime_base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "zppo.plan_command", QUICKSTART, "--calibrate"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + PATIENCE
    while not children:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, error) == (130, "", "zppo plan: stopped\n")
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive and not os.listdir(tmp_path)
    assert not list(runtime_base.glob("*zppo-*"))


def test_the_weights_of_a_killed_calibration_are_taken_away_by_the_next_run(
    runtime_base: Path,
) -> None:
    with calibration_folder() as folder:
        assert runtime.sweep() == [] and folder.is_dir()
    assert not list(runtime_base.iterdir())
    code = (
        "import os, signal; from zppo.capacity.measuring import calibration_folder\n"
        "with calibration_folder() as folder:\n"
        "    (folder / 'weights').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == -signal.SIGKILL
    [left] = runtime_base.iterdir()
    assert runtime.sweep() == [left] and not list(runtime_base.iterdir())


@pytest.mark.slow
def test_settings_under_which_training_overflows_are_named(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e10, "weight_decay": 1e25}
    settings = topology(optimizer=optimizer, student={"model": STUDENT, "dtype": "float32"})
    trainer = build_trainer(settings, time.perf_counter)
    ones = {name: torch.ones_like(one) for name, one in trainer.policy.parameters().items()}
    trainer.optimizer.step(ones)
    published(trainer, 1, tmp_path)
    trainer.optimizer.step(ones)
    with pytest.raises(UserError) as caught:
        published(trainer, 2, tmp_path)
    assert str(caught.value) == (
        "--calibrate: after its updates tensor 'model.embed_tokens.weight' holds values that are "
        "not finite; lower optimizer.learning_rate (1e+10) or optimizer.weight_decay (1e+25), or "
        "raise optimizer.epsilon (1e-08)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["policy-1.bin"]


def made(**sections: object) -> Topology:
    return topology(method={"group_size": 4}, **sections)


def test_random_windows_are_of_expected_size() -> None:
    windows = Windows(made(), (5, 7), 3, Accuracies(values=(0.5,)), vocabulary=11)
    window = windows.window(2, 50)
    assert window.step == 2 and len({group.group_id for group in window.groups}) == 50
    lengths = np.concatenate([np.diff(group.samples.offsets) for group in window.groups])
    assert len(lengths) == 200 and set(lengths.tolist()) == {5, 7}
    assert all(len(group.samples.prompt_ids) == 3 for group in window.groups)
    ids = np.concatenate([group.samples.token_ids for group in window.groups])
    assert set(ids.tolist()) == set(range(11))
    assert all(
        group.samples.versions_T.tolist() == [2] * len(group.samples.token_ids)
        for group in window.groups
    )
    rewards = np.concatenate([group.rewards for group in window.groups])
    assert 60 <= rewards.sum() <= 140
    assert window.groups[0].scores is None and window.groups[0].reward_parts is None
