"""Processes of this host that have ended, or never began, with the real kernel's numbers."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from unshared import PROCESS_IDS, run_unshared

from zppo_actors.supervisor.children import Child, spawn

TAKEN_NUMBER = """
import sys, time
from pathlib import Path
from zppo_actors.supervisor.children import spawn

def born(*command):
    log = Path(sys.argv[1])
    return spawn(command, name="a", role="a", incarnation=0, log=log, env={}, inherited=())

gone = born("true")
while not gone.ended:
    time.sleep(0.01)
Path("/proc/sys/kernel/ns_last_pid").write_text(str(gone.process.pid - 1))
stranger = born("cat", "/dev/zero")
assert stranger.process.pid == gone.process.pid
gone.kill()
print(stranger.ended)
stranger.kill()
print(stranger.exit_code)
"""


def born(log: Path, *command: str) -> Child:
    return spawn(
        command, name="rollout-0", role="rollout", incarnation=0, log=log, env={}, inherited=()
    )


def test_the_number_of_one_that_has_ended_is_somebody_elses(tmp_path: Path) -> None:
    """In a space of process ids of its own, where a number can be given out again on purpose."""
    done = run_unshared(PROCESS_IDS, TAKEN_NUMBER, str(tmp_path / "log"))
    assert done.stdout == "False\n-9\n", done.stderr


def test_what_one_leaves_behind_ends_when_its_end_is_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = born(log, "sh", "-c", "cat /dev/zero > /dev/null & echo $!")
    assert child.exit_code == 0
    left = Path("/proc", log.read_text().strip(), "cmdline")
    while left.exists() and left.read_bytes():  # a zombie has no command line
        pass


@pytest.mark.parametrize("lacking", ["files", "folder", "program"])
def test_one_that_cannot_be_started_has_ended(tmp_path: Path, lacking: str) -> None:
    """So that it is tried again like one that dies, and the run goes on meanwhile."""
    log, command = tmp_path / "logs" / "a.log", "true"
    if lacking != "folder":
        log.parent.mkdir()
    if lacking == "program":
        command = str(tmp_path / "no-python")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if lacking == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        child = born(log, command)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    why = "Too many open files" if lacking == "files" else "No such file or directory"
    assert child.ended and child.exit_code == 1
    assert child.process.reason == f"it could not be started ({why})"
    child.kill()
    assert born(tmp_path / "b.log", "true").exit_code == 0
