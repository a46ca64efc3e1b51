"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and is no worse than its
budget."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_stay_within_their_budget() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/kernel_budget.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "within the budget" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_worse_kernel_is_named() -> None:
    """The comparison can fail: every number is held to its own direction."""
    script = (
        "import sys; sys.path.insert(0, 'tools'); from kernel_budget import complaints, "
        "load_widths\n"
        "old = {'registers': 60, 'spill_bytes': 0, 'wide_loads': 6, 'other_loads': 2}\n"
        "new = {'registers': 61, 'spill_bytes': 8, 'wide_loads': 5, 'other_loads': 3}\n"
        "print(len(complaints('k', new, old)), len(complaints('k', old, old)), len(complaints('k', "
        "old, None)))\n"
        "ptx = 'ld.global.v4.b32 {}; ld.global.b16 %rs; @%p ld.global.L1::evict_last.v2.b64 {}'\n"
        "print(sorted(load_widths(ptx).items()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.stdout.split("\n")[:2] == ["4 0 1", "[(2, 1), (16, 2)]"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_row_is_read_by_all_threads_before_one_overwrites_it() -> None:
    """Gradient and logits may share memory: both ways to write the gradient begin with a barrier.

    Without it a slow thread reads the target's logit after it was set to 0, and takes the other
    branch. The interpreter has one thread and cannot tell, so the compiled code is read.
    """
    script = (
        "import re, sys; sys.path.insert(0, 'tools'); from kernel_budget import cases, compiled\n"
        "case = next(case for case in cases() if case.name.startswith('policy bf16->bf16'))\n"
        "text = compiled(case, 90).asm['ttgir']\n"
        "barrier = "
        "r'[^\\n]*\\{[^\\n]*\\n(?:(?!.*(?:tt\\.load|tt\\.store|scf\\.)).*\\n)*?\\s*\\w+\\.barrier'\n"
        "print(len(re.findall(r'scf\\.if' + barrier, text)), len(re.findall(r'\\} else' + barrier, "
        "text)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.stdout.strip() == "1 1"
