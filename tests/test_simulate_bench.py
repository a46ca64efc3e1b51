"""The bench of settings, small: every bound has its row, and the bound pays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--share", "0.01"],
            "--share is 0.01; expected at least 0.03125, because a step has a question and an engine "
            "samples a group as a whole\n",
        ),
        (
            ["--share", "1.5"],
            "simulate.py: argument --share: '1.5' is not a number above 0, at most 1; see "
            "simulate.py --help\n",
        ),
        (
            ["--share", "0.5", "--small"],
            "simulate.py: argument --small: not allowed with argument --share; see simulate.py "
            "--help\n",
        ),
    ],
)
def test_a_part_of_a_setting_that_is_none_is_one_sentence(
    options: list[str], sentence: str
) -> None:
    command = [sys.executable, "-P", "benches/simulate.py", "benches/setting_p.yaml", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.slow
def test_the_bench_prints_a_row_for_every_bound() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-P", "benches/simulate.py", "benches/setting_p.yaml"),
            *("--small", "--bounds", "0,2", "--steps", "12", "--seeds", "1"),
            *("--batches", "windows,filled", "--by-step"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=True,
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[:5]] == [
        ["| bound", "batches"],
        ["| 0", "windows"],
        ["| 0", "filled"],
        ["| 2", "windows"],
        ["| 2", "filled"],
    ]
    seconds = [float(row[2]) for row in rows[1:5]]
    assert seconds[0] == seconds[1] > seconds[2] > 1.3 * seconds[3]
    assert sum(row[0] == "| 11" for row in rows) == 4, "what each step trained"
