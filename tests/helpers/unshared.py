"""Scripts that have something of the system to themselves: process ids, of which one can be given out
again on purpose, mounts, or a network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROCESS_IDS = ("--pid", "--fork", "--mount-proc")
"""The script is the first process."""
MOUNTS = ("--mount",)
NETWORK = ("--net",)
"""Its loopback interface is down."""


def run_unshared(
    what: tuple[str, ...], script: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run `script` by this Python with `what` of its own. The test is skipped where that cannot be
    had."""
    tried = subprocess.run(["unshare", *what, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{tried.stderr.strip()} (unshare {' '.join(what)})")
    return subprocess.run(
        ["unshare", *what, sys.executable, "-P", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
