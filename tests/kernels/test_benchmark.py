"""The benchmark runs from end to end on a tiny size, and its page is made of what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_writes_numbers_and_prints_tables(tmp_path: Path) -> None:
    out = tmp_path / "kernels-cpu.json"
    command = [
        sys.executable,
        "-P",
        str(ROOT / "benches/kernels.py"),
        "--quick",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    command += ["--only", "log-probs from hidden states zppo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(out.read_text())["results"]
    assert [row["suite"] for row in results] == ["log-probs from hidden states"]
    assert all(
        row["seconds"] > 0 and row["share_of_limit"] > 0 and "peak_bytes" in row for row in results
    ), results
    assert "### log-probs from hidden states: N = 128, H = 16, V = 512" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_small_sweep_runs_interpreted_and_a_real_one_asks_for_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    command = [sys.executable, "-P", str(ROOT / "benches/kernels.py"), "--sweep", "--device", "cpu"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        "a sweep measures a GPU and this machine has none; --sweep --quick runs its small form under "
        "Triton's interpreter\n"
    )
    small = [*command, "--quick", "--repeats", "1", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(small, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(out.read_text())
    times = {row["threads"]: row["seconds"] for row in found["rows"]}
    assert len(times) == 2 and found["best"]["threads"] == min(times, key=times.__getitem__)
    assert found["best"]["chunk_rows"] == 64
    assert f"Tuning(threads={found['best']['threads']}," in done.stdout


def test_the_page_shows_failures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(
        ROOT / "benches"
    )  # for this test alone: its `kernels.py` bears the name of a package
    from kernel_report import write_report

    size = {
        "suite": "policy loss from logits",
        "rows": 64,
        "hidden": 8,
        "vocabulary": 100,
        "live": 1.0,
    }
    rows = [
        size | {"contestant": "zppo", "seconds": 0.5, "peak_bytes": 2**21, "share_of_limit": 0.875},
        size | {"contestant": "torch", "seconds": 1.0, "peak_bytes": 2**22},
        size | {"contestant": "Liger Triton", "error": "RuntimeError: no | driver"},
    ]
    machine = {"device": "a CPU", "torch": "2", "python": "3"}
    (tmp_path / "kernels-cpu.json").write_text(json.dumps({"machine": machine, "results": rows}))
    write_report(tmp_path, tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert f"| zppo | 500.0 ms | {'█' * 12} | 2 MiB | 88% |" in lines
    assert f"| torch | 1,000.0 ms | {'█' * 24} | 4 MiB |  |" in lines
    assert "| Liger Triton | - | not run: RuntimeError: no / driver | - | - |" in lines
    assert "No GPU was at hand" in "\n".join(lines)
