"""A space of process ids of its own, where a number can be given out again on purpose."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_with_own_process_ids(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `script` by this Python as the first process of such a space. The test is skipped where
    there are none."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("there are no namespaces of process ids here")
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-P", "-c", script]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)
