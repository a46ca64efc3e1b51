"""`zppo quickstart` as a parent: who hears which signal. The run itself is in tests/test_wheel.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zppo.quickstart import TOPOLOGY

CHILD = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: sys.exit(number))
print("ready", flush=True)
time.sleep(600)
"""
PARENT = "import sys; from zppo.quickstart import _run; sys.exit(_run(sys.argv[1:]))"


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    [mask] = re.findall(r"^SigCgt:\s*(\S+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_end_is_passed_on_and_ctrl_c_left_to_the_run(number: signal.Signals) -> None:
    """A terminal sends Ctrl-C to the run itself; here only the parent gets it, and waits on."""
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        text=True,
        # Under nohup the hang-up would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    while not handles(parent.pid, signal.SIGTERM):  # it may not have got so far when its child has
        assert parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(signal.SIGINT)
    parent.send_signal(number)
    assert parent.wait(timeout=600) == number


def test_its_run_is_one_of_the_topology_in_examples() -> None:
    """Else `zppo plan examples/quickstart.yaml --from-run` would find other models in it."""
    root = Path(__file__).resolve().parents[2]
    assert root / "examples" / "quickstart.yaml" == TOPOLOGY
