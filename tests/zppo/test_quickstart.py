"""`zppo quickstart` as a parent: who hears which signal. The run itself is in tests/test_wheel.py."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zppo.quickstart import TOPOLOGY

CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
print("ready", flush=True)
time.sleep(600)
"""
PARENT = "import sys; from zppo.quickstart import _run; sys.exit(_run(sys.argv[1:]))"


@pytest.mark.slow
def test_sigterm_is_passed_on_and_ctrl_c_left_to_the_run() -> None:
    """A terminal sends Ctrl-C to the run itself; here only the parent gets it, and waits on."""
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGINT)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=600) == 7


def test_its_run_is_one_of_the_topology_in_examples() -> None:
    """Else `zppo plan examples/quickstart.yaml --from-run` would find other models in it."""
    root = Path(__file__).resolve().parents[2]
    assert root / "examples" / "quickstart.yaml" == TOPOLOGY
