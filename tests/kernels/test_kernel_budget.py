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
        [sys.executable, str(ROOT / "tools/kernel_budget.py"), "--short"],
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
        "import sys; sys.path.insert(0, 'tools')\n"
        "from kernel_budget import LIMITED, complaints, full_tile_loops, load_bytes, load_widths\n"
        "old = dict.fromkeys(LIMITED, 4) | {'wide_loads': 6}\n"
        "new = dict.fromkeys(LIMITED, 4.1) | {'wide_loads': 5}\n"
        "print(len(complaints('k', new, old)), len(complaints('k', old, old)), len(complaints('k', "
        "old, None)))\n"
        "ptx = 'ld.global.v4.b32 {}; ld.global.b16 %rs; @%p ld.global.L1::evict_last.v2.b64 {}'\n"
        "print(sorted(load_widths(ptx).items()))\n"
        "loop = ['LDG.E.128 R4, desc[UR4][R2.64]', 'MUFU.EX2 R4, R4', '@P0 BRA 0x0']\n"
        "masked = ['@P1 LDG.E R4, desc[UR4][R2.64]', 'MUFU.EX2 R4, R4', '@P0 BRA 0x30']\n"
        "code = [(16 * at, text) for at, text in enumerate([*loop, *masked, 'EXIT'])]\n"
        "print(full_tile_loops(code) == [loop], [load_bytes(text[-1]) for text in (loop[:1], ['LDG.E R4, desc[UR4][R2.64]'])])"
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
    assert done.stdout.splitlines() == ["8 0 1", "[(2, 1), (16, 2)]", "True [16, 4]"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_row_is_read_by_all_threads_before_one_overwrites_it() -> None:
    """Gradient and logits may share memory: both ways to write the gradient begin with a barrier,
    and where the gradient is narrower, so does every run of tiles that is written without another.

    Without it a slow thread reads the target's logit after it was set to 0, and takes the other
    branch. The interpreter has one thread and cannot tell, so the compiled code is read.
    """
    script = (
        "import re, sys; sys.path.insert(0, 'tools'); from kernel_budget import cases, compiled\n"
        "def text_of(name):\n"
        "    case = next(case for case in cases() if case.name == name)\n"
        "    return compiled(case, 90).asm['ttgir']\n"
        "quiet = r'(?:(?!.*(?:tt\\.load|tt\\.store|scf\\.)).*\\n)*?'\n"
        "barrier = r'[^\\n]*\\{[^\\n]*\\n' + quiet + r'\\s*\\w+\\.barrier'\n"
        "text = text_of('policy bf16->bf16, even')\n"
        "print(len(re.findall(r'scf\\.if' + barrier, text)), len(re.findall(r'\\} else' + barrier, "
        "text)))\n"
        "turn = r'\\} do' + barrier + r'[^\\n]*\\n' + quiet + r'[^\\n]*scf\\.for'\n"
        "print(len(re.findall(turn, text)), *(len(re.findall(turn, text_of(name))) for name in "
        "('policy fp32->bf16, even', 'jsd fp32->bf16, even')))"
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
    assert done.stdout.splitlines() == ["1 1", "0 1 1"]
