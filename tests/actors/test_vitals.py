"""What processes use, read off real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest

from zppo_actors.supervisor.vitals import MOVED_BYTES, Vitals, children_by_parent, usage

BUSY = "while True: pass"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


@pytest.fixture(params=[BUSY, PARENT], ids=["itself", "its child"])
def busy(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", request.param], start_new_session=True)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def used(pid: int) -> dict[Hashable, tuple[float, int]]:
    return {pid: usage(pid, children_by_parent())}


def used_more(pid: int, before: tuple[float, int], seconds: float) -> bool:
    return usage(pid, children_by_parent())[0] - before[0] >= seconds


@pytest.mark.slow
def test_a_busy_process_moves_and_a_stopped_one_is_still(busy: subprocess.Popen[bytes]) -> None:
    vitals = Vitals()
    vitals.sample(used(busy.pid), 0.0)
    before = usage(busy.pid, children_by_parent())
    while not used_more(busy.pid, before, 0.2):
        pass
    vitals.sample(used(busy.pid), 10.0)
    assert vitals.still_for(busy.pid, 10.0) == 0.0
    os.killpg(busy.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, busy.pid, os.WSTOPPED)
    vitals.sample(used(busy.pid), 20.0)  # what it used before the signal reached it
    vitals.sample(used(busy.pid), 30.0)
    vitals.sample(used(busy.pid), 40.0)
    assert vitals.still_for(busy.pid, 40.0) >= 20.0


def test_reading_counts_as_much_as_computing(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2 * MOVED_BYTES))
    before = usage(os.getpid(), children_by_parent())
    file.read_bytes()
    assert usage(os.getpid(), children_by_parent())[1] - before[1] >= 2 * MOVED_BYTES


def test_a_process_that_is_gone_is_still() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    vitals = Vitals()
    vitals.sample(used(process.pid), 1.0)
    vitals.sample(used(process.pid), 5.0)
    assert vitals.still_for(process.pid, 5.0) == 4.0
    assert usage(process.pid, children_by_parent()) == (0.0, 0)
