"""Every bench runs: small, as a command, and with a result that makes sense. Adding one is a line
of `BENCHES`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BENCHES = {
    "controller": ["--steps", "2", "--questions", "8", "--tokens", "16", "--method", "zppo"],
    "dispatch": ["4", "28"],
    "engine": ["--slots", "4", "--sequences", "8", "--tokens", "8", "--repeats", "1"],
    "trainer": ["--steps", "2", "--groups", "6"],
    "padding": ["--questions", "4", "--seeds", "1"],
    "long_rows": ["--width=64", "--prompt=400", "--response=500", "--group=3", "--repeats=1"],
    "ranks": ["--layers=1", "--hidden=64", "--vocabulary=128", "--tokens=512", "--repeats=1"],
    "weights_hosts": ["--tensors=2", "--rows=256", "--repeats=1"],
    "weight_load": ["--layers=2", "--width=128", "--repeats=1"],
    "protocol": ["--completions", "2", "--tokens", "64", "--repeats", "2"],
}
"""Arguments of a bench's small form, by its name in `benches/`."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_runs_small(name: str) -> None:
    command = [sys.executable, "-P", str(ROOT / "benches" / f"{name}.py"), *BENCHES[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert any(character.isdigit() for character in done.stdout)
