"""`make test`, with commands in the place of its tools that say what they were and end as they are
told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {
    "bin/ruff": "ruff",
    "bin/mypy": "mypy",
    "bin/python": "suite",
    "peers/bin/python": "peers",
}
"""What each of them is, by its place in the environment."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that counts as installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    for place, name in TOOLS.items():
        tool = tmp_path / ".venv" / place
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(f"#!/bin/sh\necho {name} >> said\necho this is {name}\nexec $DOES_{name}\n")
        tool.chmod(0o755)
    for name in ("", "-smollm2", "-dev", "-vllm", "-torchvision", "-peers"):
        (tmp_path / f".venv/.installed{name}").touch()
    return tmp_path


def make(house: Path, *arguments: str, **does: str) -> subprocess.Popen[str]:
    """`make` in a session of its own; `does`: what a tool then does, `true` if nothing is said."""
    doing = {f"DOES_{name}": does.get(name, "true") for name in TOOLS.values()}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(
        ["make", *arguments], cwd=house, env=plain | doing, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ran(house: Path) -> list[str]:
    said = house / "said"
    return sorted(said.read_text().split()) if said.exists() else []


def test_all_of_it_runs_and_what_ran_beside_is_heard_at_the_end(house: Path) -> None:
    making = make(house, "test")
    said, _ = making.communicate()
    assert making.returncode == 0, said
    assert ran(house) == sorted(TOOLS.values())
    assert said.splitlines()[-2:] == ["this is mypy", "this is peers"]


@pytest.mark.parametrize("name", TOOLS.values())
def test_whatever_fails_fails_make_test(house: Path, name: str) -> None:
    making = make(house, "test", **{name: "false"})
    said, _ = making.communicate()
    assert making.returncode == 2, said
    assert f"this is {name}" in said
    # The suite is run to its end whether or not the type checker has found something.
    assert ("suite" in ran(house)) == (name != "ruff")


def test_a_dry_run_runs_nothing(house: Path) -> None:
    making = make(house, "--dry-run", "test")
    said, _ = making.communicate()
    assert making.returncode == 0 and "-m pytest -n 2" in said
    assert ran(house) == []


def test_ctrl_c_ends_what_runs_beside(house: Path) -> None:
    making = make(house, "test", suite="sleep 600", mypy="sleep 600")
    while ran(house) != ["mypy", "ruff", "suite"]:
        assert making.poll() is None
        time.sleep(0.02)
    tree = psutil.Process(making.pid).children(recursive=True)
    os.killpg(making.pid, signal.SIGINT)  # as a terminal does
    making.communicate()
    assert making.returncode != 0
    assert not psutil.wait_procs(tree, timeout=600)[1]
