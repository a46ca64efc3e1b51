"""A disk that is full when an attempt begins: a sentence each, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from unshared import MOUNTS, run_unshared

from zppo_actors.controller.recorder import opening

SCRIPT = """
import subprocess, sys
from pathlib import Path
from zppo.config.topology import DataConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo.records import run_directory
from zppo_actors.controller.controller import Controller
from zppo_actors.controller.recorder import opening
from zppo_actors.process import ActorContext

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
topology = Topology(data=DataConfig(train="unused"), student=StudentConfig(model="unused"))
before = run_directory.create(disk / "run", topology)
with open(disk / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
context = ActorContext(
    run_dir=disk / "run", runtime=disk, actor="controller", role="controller", incarnation=0,
    topology=topology, run_id="run", start_version=0,
)

def begin():
    with opening(disk / "run"):
        Controller(context, None)

for what in (
    lambda: run_directory.renew(disk / "run", 0),
    lambda: run_directory.count_death(disk / "run", 0),
    begin,
):
    try:
        what()
    except UserError as error:
        print(error)
print(run_directory.read(disk / "run") == before)
"""


def test_an_attempt_that_cannot_be_recorded_is_one_sentence(tmp_path: Path) -> None:
    done = run_unshared(MOUNTS, SCRIPT, str(tmp_path))
    record = (
        f"'{tmp_path}/run/run.json' cannot be written (No space left on device); expected room "
        "there, then zppo launch --resume\n"
    )
    assert done.stdout == (
        f"{record}{record}the records in '{tmp_path}/run' cannot be written (database or disk is "
        "full); expected a disk with room there, then zppo launch --resume\nTrue\n"
    ), done.stderr


def test_what_is_not_there_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """A checkpoint or a file of questions: another attempt may find it."""
    with pytest.raises(FileNotFoundError), opening(tmp_path):
        (tmp_path / "scheduler.msgpack").read_bytes()
