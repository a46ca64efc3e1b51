"""Whole runs with real processes, sockets and models: faults, resume, Ctrl-C, clean exit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from living import command_of

from zppo.capacity.recorded import read_recorded
from zppo.records import checkpoint
from zppo.simulation import World, simulate

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
PATIENCE = 900.0
LONG = 50
"""Steps of a run that is still at work when it is interrupted after its first, on any machine."""
SMALL = {
    "scheduler.new_questions": 8,
    "scheduler.lease_seconds": 60,
    "evaluation.limit": 8,
    "evaluation.samples": 2,
    "evaluation.every": "null",
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
}

pytestmark = pytest.mark.slow


class Run:
    """One `python -m zppo.launch` and what it left."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        output: int | IO[str] = subprocess.PIPE,
        **settings: Any,
    ) -> None:
        self.directory = directory
        command = [sys.executable, "-P", "-m", "zppo.launch", *arguments]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        self.process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Under nohup the hang-up would be ignored, by the tests and by all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    @classmethod
    def new(cls, directory: Path, steps: int, **settings: Any) -> Run:
        merged = {**SMALL, "run.directory": directory, "run.steps": steps, **settings}
        return cls(directory, "--topology", str(QUICKSTART), **merged)

    @classmethod
    def resume(cls, directory: Path, **settings: Any) -> Run:
        return cls(directory, "--resume", str(directory), **settings)

    def wait(self) -> str:
        """Wait for the end and return everything it printed."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(
                f"the run hangs:\n{self.process.communicate()[0]}\n{self.logs()}"
            ) from None
        return output or ""

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of the running run."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, (
                f"the run ended early:\n{self.wait()}\n{self.logs()}"
            )
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def steps(self) -> int:
        file = self.directory / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def actor(self, name: str) -> psutil.Process | None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if name in command_of(child):
                return child
        return None

    def kill_actor(self, name: str) -> None:
        found: list[psutil.Process] = []

        def there() -> bool:
            child = self.actor(name)
            found.extend([child] if child else [])
            return bool(found)

        self.until(there)
        found[0].kill()

    def summary(self) -> dict[str, Any]:
        command = [sys.executable, "-P", "-m", "zppo.report", str(self.directory), "--json"]
        return json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )

    def logs(self) -> str:
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)


def test_a_killed_rollout_actor_costs_nothing(tmp_path: Path) -> None:
    """Over an encrypted port, as between hosts; the other runs of this file use Unix sockets."""
    run = Run.new(tmp_path / "run", steps=8, **{"transport.kind": "tcp"})
    run.until(lambda: run.steps() >= 1)
    run.kill_actor("rollout-1")
    output = run.wait()
    assert run.process.returncode == 0, output + run.logs()
    summary = run.summary()
    assert summary["steps"] == 8
    assert summary["trained_twice"] == 0 and summary["lost"] == 0
    assert summary["questions_new"] == 64
    assert summary["max_staleness_seen"] <= 2
    assert summary["heldout_before"] is not None and summary["heldout_after"] is not None
    assert "rollout-1 was killed" in output
    # What a real run leaves is enough to read its speeds off, and to replay it.
    recorded = read_recorded(run.directory)
    world = World.of(recorded.topology, recorded.calibration)
    replayed = simulate(world, recorded.steps, warm=recorded.warm).seconds_per_step
    assert recorded.calibration.speeds.rollout.slots == 32
    # It takes two engines throughout, as fast as they were: far off only if a unit is wrong.
    assert 0.01 < replayed / recorded.seconds_per_step < 100.0


def test_ctrl_c_saves_and_resume_continues(tmp_path: Path) -> None:
    run = Run.new(tmp_path / "run", steps=LONG)
    run.until(lambda: run.steps() >= 1)
    run.process.send_signal(signal.SIGINT)
    output = run.wait()
    assert run.process.returncode == 130, output + run.logs()
    reached = checkpoint.find_latest(run.directory).step
    assert 1 <= reached < LONG
    assert f"continue: zppo launch --resume {run.directory}" in output
    steps = reached + 3
    resumed = Run.resume(run.directory, **{"run.steps": steps})
    output = resumed.wait()
    assert resumed.process.returncode == 0, output + resumed.logs()
    summary = resumed.summary()
    assert summary["steps"] == steps and summary["trained_twice"] == 0 and summary["lost"] == 0
    assert summary["questions_new"] == 8 * steps


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    run = Run.new(tmp_path / "run", steps=LONG)
    run.until(lambda: run.steps() >= 1)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    output = run.wait()
    assert run.process.returncode == 130
    assert "stopped at once" in output


def test_a_run_stopped_in_its_last_evaluation_makes_it_up(tmp_path: Path) -> None:
    run = Run.new(tmp_path / "run", steps=1, **{"evaluation.limit": 64, "evaluation.samples": 4})
    run.until(lambda: run.steps() == 1)
    run.process.send_signal(signal.SIGINT)
    output = run.wait()
    assert run.process.returncode == 130, output + run.logs()
    assert checkpoint.find_latest(run.directory).step == 1
    assert run.summary()["heldout_after"] is None
    resumed = Run.resume(run.directory)
    output = resumed.wait()
    assert resumed.process.returncode == 0, output + resumed.logs()
    summary = resumed.summary()
    assert summary["heldout_after"] is not None and summary["steps"] == 1
    again = Run.resume(run.directory)
    assert "the run is finished, step 1 was its last" in again.wait()


# ---- exactness -----------------------------------------------------------------------------------

EXACT = {"scheduler.max_staleness": 0, "method.correction": "none", "checkpoints.every": 1}


def kill_tree(run: Run) -> None:
    """SIGKILL for every process of the run at once, as when the machine goes down."""
    launcher = psutil.Process(run.process.pid)
    everybody = [launcher, *launcher.children(recursive=True)]
    for process in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended because another one has
            process.kill()
    run.process.wait()
    psutil.wait_procs(everybody, timeout=PATIENCE)


def kill_supervisor(run: Run, runtime_base: Path) -> None:
    """SIGKILL for the supervisor alone: nothing survives it."""
    children = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    assert len(children) >= 6
    run.process.wait()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive
    deadline = time.monotonic() + PATIENCE
    while list(runtime_base.glob("zppo-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ledger(run: Run) -> dict[str, list[tuple[Any, ...]]]:
    connection = sqlite3.connect(run.directory / "journal.sqlite")
    tables = {
        "trained": connection.execute("SELECT * FROM trained ORDER BY rowid").fetchall(),
        "dispatched": connection.execute("SELECT * FROM dispatched").fetchall(),
    }
    connection.close()
    return tables


def left(run: Run, steps: int) -> dict[str, bytes]:
    """What the run is for: the weights, the optimizer's state, and what was measured on the way."""
    names = (
        "heldout.jsonl",
        "fates.jsonl",
        f"checkpoints/step-{steps}/model/model.safetensors",
        f"checkpoints/step-{steps}/trainer.safetensors",
    )
    return {name: (run.directory / name).read_bytes() for name in names}


def test_the_exact_mode_is_bit_equal_through_a_kill(tmp_path: Path, runtime_base: Path) -> None:
    """Also, the uninterrupted run is the second start in its directory: the first one was killed
    before it had trained anything. Of the other one the supervisor alone is killed."""
    steps = 3
    first = Run.new(tmp_path / "whole", steps, **EXACT)
    first.until(lambda: (first.directory / "journal.sqlite").exists())
    kill_tree(first)
    whole = Run.new(tmp_path / "whole", steps, **EXACT)
    output = whole.wait()
    assert whole.process.returncode == 0, output + whole.logs()

    killed = Run.new(tmp_path / "killed", steps, **EXACT)
    killed.until(lambda: checkpoint.find_latest(killed.directory).step >= 1)
    kill_supervisor(killed, runtime_base)
    assert checkpoint.find_latest(killed.directory).step < steps
    resumed = Run.resume(killed.directory)
    output = resumed.wait()
    assert resumed.process.returncode == 0, output + resumed.logs()

    assert ledger(resumed) == ledger(whole)
    assert len(ledger(whole)["dispatched"]) == 8 * steps
    expected, found = left(whole, steps), left(resumed, steps)
    assert [name for name in expected if found[name] != expected[name]] == []


# ---- a terminal that is lost, a process that hangs, a disk that is full --------------------------


def test_a_closed_pipe_costs_the_view_and_a_hang_up_is_one_ctrl_c(tmp_path: Path) -> None:
    run = Run.new(tmp_path / "run", steps=LONG)
    assert run.process.stdout is not None
    assert run.process.stdout.readline()
    run.process.stdout.close()
    run.until(lambda: run.steps() >= 2)
    assert "the terminal is lost" in (run.directory / "logs/supervisor.log").read_text()
    os.kill(run.process.pid, signal.SIGHUP)
    assert run.process.wait(PATIENCE) == 130
    steps = run.steps()
    assert 2 <= steps < LONG
    assert checkpoint.find_latest(run.directory).step == steps


def test_a_trainer_that_freezes_and_one_that_is_killed_are_replaced(tmp_path: Path) -> None:
    """The run begins again from its last checkpoint, twice; a full terminal costs nothing."""
    with open("/dev/full", "w") as full:
        settings = {"scheduler.lease_seconds": 15, "checkpoints.every": 1}
        run = Run.new(tmp_path / "run", steps=8, output=full, **settings)
    run.until(lambda: run.steps() >= 1)
    trainer = run.actor("trainer")
    assert trainer is not None
    trainer.suspend()
    run.until(lambda: "it said and did nothing for 15 s" in run.logs())
    reached = checkpoint.find_latest(run.directory).step
    run.until(lambda: checkpoint.find_latest(run.directory).step > reached)
    run.kill_actor("trainer")
    run.wait()
    assert run.process.returncode == 0, run.logs()
    said = (run.directory / "logs" / "supervisor.log").read_text()
    assert [line.partition(" ended: ")[2] for line in said.splitlines() if " ended: " in line] == [
        "trainer was killed by SIGKILL because it said and did nothing for 15 s",
        "trainer was killed by SIGKILL",
        "finished: 8 of 8 steps",
    ]
    summary = run.summary()
    assert summary["steps"] == 8 and summary["trained_twice"] == 0 and summary["lost"] == 0
    assert summary["questions_new"] == 64


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_training_goes_on(small_disk: Path) -> None:
    """Until there is room again: then the run ends as if nothing had been."""
    run = Run.new(
        small_disk / "run", steps=2, **{"checkpoints.every": 1, "sinks.rollouts": "false"}
    )
    run.until(lambda: (run.directory / "journal.sqlite").exists())
    filler = small_disk / "filler"  # leaves room for records, and not for a checkpoint
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (2 << 20)))
    run.until(lambda: run.steps() >= 2)
    filler.unlink()
    output = run.wait()
    assert run.process.returncode == 0, output
    assert "the checkpoint of step 1 cannot be written: " in output
    assert "No space left on device" in output
    assert checkpoint.find_latest(run.directory).step == 2
