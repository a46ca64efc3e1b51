"""`zppo quickstart` from the wheel: installed into an environment that has the locked packages and
nothing of this repository, run in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("zppo", "protocol", "kernels", "actors", "examples", "pyproject.toml", "README.md")
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
SECONDS = 900.0


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of an environment that the wheel is installed in."""
    source = tmp_path_factory.mktemp("source")
    for name in (*SOURCES, "LICENSE"):  # a copy, because a build leaves its files beside the source
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, source / name, symlinks=True)
        else:
            shutil.copy(here, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", "dist", ".", cwd=source)
    (wheel,) = (source / "dist").iterdir()
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    call(*pip, "--python", python, "install", *offline, wheel, cwd=folder)
    # The packages of this environment, without its .pth files, which lead to the repository.
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = call(installed / "python", "-c", "import zppo; print(zppo.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed.parent)
    less = ("run.steps=2", "scheduler.new_questions=8", "evaluation.limit=8", "evaluation.every=9")
    given = [part for setting in (*less, "actors.rollout.count=1") for part in ("--set", setting)]
    said = call(installed / "zppo", "quickstart", *given, cwd=tmp_path)
    assert "finished: 2 of 2 steps" in said
    assert said.endswith("report: runs/quickstart/report/index.html\n")
    run = tmp_path / "runs/quickstart"
    assert (run / "checkpoints/step-2/model/model.safetensors").exists()
    record = json.loads((run / "run.json").read_text())
    student = Path(record["topology"]["student"]["model"])
    assert student.is_relative_to(installed.parent) and student.parts[-3] == "examples"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_a_quickstart_that_is_there_already_is_left_alone(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/mine").touch()
    done = subprocess.run(
        [installed / "zppo", "quickstart"],
        cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        f"run.directory: '{tmp_path}/runs/quickstart' exists already; remove it, or name another "
        "directory\n",
    )
    assert [path.name for path in (tmp_path / "runs/quickstart").iterdir()] == ["mine"]
