"""Actors that are forked from a process which has loaded everything: children like any other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from supervisor_helpers import Lines, stub_command

from zppo.config.load import load
from zppo.config.topology import DataConfig, StudentConfig, Topology
from zppo.plan.processes import processes
from zppo.records import run_directory
from zppo.signals import PR_SET_CHILD_SUBREAPER, Interrupts
from zppo_actors import nursery as inside
from zppo_actors.own_time import MOST_SECONDS
from zppo_actors.supervisor.children import Child, spawn
from zppo_actors.supervisor.fleet import Fleet
from zppo_actors.supervisor.gathering import LIMITS
from zppo_actors.supervisor.listening import Ear, Ears
from zppo_actors.supervisor.nursery import Nursery, forked
from zppo_actors.supervisor.run_attempt import RunAttempt, actor_command
from zppo_protocol import keys
from zppo_protocol.sockets import Router

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart.yaml"
PATIENCE = 600.0


def table(*settings: str) -> list[str]:
    return forked(processes(load(QUICKSTART, list(settings)), available_cores=2))


def test_who_is_forked() -> None:
    """Whoever runs a model with transformers, if there are two of them at least."""
    assert table() == ["trainer", "rollout-0", "rollout-1", "teacher-0"]
    simulated = "actors.rollout.engine=simulated"
    assert table(simulated) == ["trainer", "teacher-0"]
    assert table(simulated, "method.name=grpo", "teacher=null") == []


def test_who_has_an_ear_is_not_forked(tmp_path: Path) -> None:
    """What the nursery has, all that are forked of it have; an ear is nobody's but its owner's."""
    run_directory.create(tmp_path / "run", load(QUICKSTART))
    record = run_directory.read(tmp_path / "run")

    def forked_with(ears: Ears) -> list[str]:
        arguments = (record, 0, Lines(), Interrupts(), actor_command, None, ears)
        return RunAttempt(tmp_path / "run", *arguments)._forked

    with socket.create_server(("127.0.0.1", 0)) as bound:
        ear = Ear(bound, "", "")
        assert forked_with(Ears()) == ["trainer", "rollout-0", "rollout-1", "teacher-0"]
        assert forked_with(Ears(ear, ear)) == ["rollout-0", "rollout-1", "teacher-0"]


class Ward:
    """A nursery and what it takes to have actors of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.log = folder, folder / "run", folder / "grader-0.log"
        source = Topology(
            data=DataConfig(train="train.jsonl"), student=StudentConfig(model="student")
        )
        run_directory.create(self.run, source)
        self.parent_fd, self.write_end = os.pipe()
        self.nursery = Nursery(folder / "nursery.log", {"OMP_NUM_THREADS": "1"}, self.parent_fd)

    def command(self, run: Path) -> list[str]:
        command = [sys.executable, "-P", "-m", "zppo_actors", "grader", "--run", str(run)]
        command += ["--runtime", str(self.folder / "rt"), "--actor", "grader-0"]
        return [*command, "--incarnation", "0", "--parent-fd", str(self.parent_fd)]

    def ask(self, run: Path) -> None:
        self.nursery.ask(
            self.command(run),
            name="grader-0",
            role="grader",
            incarnation=0,
            log=self.log,
            env={"OMP_NUM_THREADS": "1"},
        )

    def born(self, count: int) -> list[Child]:
        """The next so many actors."""
        deadline, found = time.monotonic() + PATIENCE, []
        while len(found) < count:
            assert time.monotonic() < deadline
            found += self.nursery.turn()
            time.sleep(0.02)
        return found


def zombies() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE}


def spawned(ward: Ward, script: str) -> Child:
    return spawn(
        ["sh", "-c", script],
        name="other",
        role="other",
        incarnation=0,
        log=ward.log,
        env={},
        inherited=(),
    )


def left_behind(deadline: float) -> None:
    """A process in a session of its own whose parent has ended, and which ends then."""
    before = zombies()
    subprocess.run(["sh", "-c", "setsid sleep 0.2 &"], check=True)
    while not zombies() - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    made = Ward(tmp_path)
    yield made
    made.nursery.close()
    os.close(made.parent_fd)
    # The process of the tests takes no orphans of other tests.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_a_forked_actor_is_a_child_like_any_other(ward: Ward) -> None:
    deadline = time.monotonic() + PATIENCE
    ward.ask(ward.folder)
    assert ward.nursery.turn() == [], "it loads, and nobody waits for it"
    [refused] = ward.born(1)
    assert refused.exit_code == 2
    assert ward.log.read_text() == f"'{ward.folder}' is not a run directory: it has no run.json\n"

    ward.ask(ward.run)
    ward.ask(ward.run)
    killed, left = ward.born(2)
    process = psutil.Process(killed.process.pid)
    while not process.children():  # the worker that grades: it is at work
        assert time.monotonic() < deadline and not killed.ended, ward.log.read_text()
        time.sleep(0.05)
    command = ward.command(ward.run)
    assert process.cmdline()[: len(command)] == command and not any(
        process.cmdline()[len(command) :]
    )
    assert process.ppid() == os.getpid() and os.getsid(process.pid) == process.pid
    shown = psutil.Process(ward.nursery.child.process.pid).cmdline()
    assert shown[: shown.index("nursery") + 1] == [*command[:4], "nursery"]

    process.kill()
    assert killed.verdict == "grader-0 was killed by SIGKILL"
    killed.kill()
    os.close(ward.write_end)
    assert left.exit_code == 1, "the end of the supervisor's pipe is its end"
    left.kill()

    nursery = ward.nursery.child
    os.kill(nursery.process.pid, signal.SIGKILL)
    left_behind(deadline)
    other = spawned(ward, "exit 3")
    while psutil.Process(other.process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    while zombies() - {other.process.pid}:  # as the supervisor does in each of its rounds
        assert time.monotonic() < deadline
        ward.nursery.reap_orphans([other])
    assert other.exit_code == 3 and nursery.exit_code == -9, "these are not taken from us"
    ward.ask(ward.run)
    [spawned_instead] = ward.born(1)
    assert spawned_instead.exit_code == 1 and ward.nursery.child.ended


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_nobody_waits_for_a_nursery_that_was_stopped(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its silence ends it; whoever was asked of it is spawned, and of those that it had forked
    unheard nobody is left."""
    ward.ask(ward.run)
    [first] = ward.born(1)
    ward.ask(ward.run)
    ward.ask(ward.run)
    os.kill(ward.nursery.child.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert ward.nursery.turn() == [] and ward.nursery.asked == ["grader-0", "grader-0"]
    left_behind(began + PATIENCE)
    ward.nursery.reap_orphans([first])
    assert zombies(), "it might be an actor whose word is on its way"

    clock = [time.monotonic() + 86_400.0]  # the supervisor was stopped as well, for a day
    monkeypatch.setattr(ward.nursery._time, "_clock", lambda: clock[0])
    assert ward.nursery.turn() == [] and ward.nursery.asked == ["grader-0", "grader-0"]
    spawned_instead: list[Child] = []
    while not spawned_instead:
        clock[0] += MOST_SECONDS
        spawned_instead = ward.nursery.turn()
    assert len(spawned_instead) == 2
    assert ward.nursery.child.exit_code == -signal.SIGKILL and ward.nursery.asked == []
    ours = {child.process.pid for child in (ward.nursery.child, first, *spawned_instead)}
    while zombies() - ours:  # an actor that ends now is a zombie until somebody asks for it
        assert time.monotonic() < began + PATIENCE
        ward.nursery.reap_orphans([first, *spawned_instead])
        time.sleep(0.02)
    os.close(ward.write_end)
    assert all(child.exit_code in (1, 2) for child in (first, *spawned_instead))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_who_was_forked_unheard_ends_with_the_nursery(ward: Ward) -> None:
    nursery = ward.nursery.child.process.pid
    others = {one for one in psutil.Process().children() if one.pid != nursery}
    ward.ask(ward.run)
    [first] = ward.born(1)
    for _ in range(3):
        ward.ask(ward.run)
    os.kill(nursery, signal.SIGSTOP)  # else all three might be heard in this one turn
    assert ward.nursery.turn() == []
    known, deadline = set(psutil.Process().children()), time.monotonic() + PATIENCE
    os.kill(nursery, signal.SIGCONT)
    while not set(psutil.Process().children()) - known:
        assert time.monotonic() < deadline
    ward.nursery.close()
    assert ward.nursery.asked == [] and ward.nursery.turn() == []
    first.kill()
    while set(psutil.Process().children()) - others:
        assert time.monotonic() < deadline
        ward.nursery.reap_orphans([])
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_the_process_that_holds_the_hosts_is_no_orphan(ward: Ward) -> None:
    """Its exit code says why they do not come back."""
    sockets = ward.folder / "sockets"
    sockets.mkdir(mode=0o700)
    access, _ = keys.issue(f"ipc://{sockets / 'hosts.sock'}", {})
    with contextlib.closing(Router(access, LIMITS)) as router:
        fleet = Fleet(router, {}, {}, ward.run, 20.0)
        record = run_directory.read(ward.run)
        attempt = RunAttempt(ward.run, record, 0, Lines(), Interrupts(), stub_command, fleet)
        attempt._nursery = ward.nursery
        fleet.keeper = spawned(ward, "exit 3")
        while psutil.Process(fleet.keeper.process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        attempt._reap()
    assert fleet.keeper.exit_code == 3


LATE = """
import sys
from zppo_actors import nursery
code = nursery.main([sys.argv[1]])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_a_nursery_whose_supervisor_has_ended_does_not_load() -> None:
    ours, ear = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ear:
        assert not inside.is_closed(ear)
        ours.close()
        command = [sys.executable, "-P", "-c", LATE, str(ear.fileno())]
        assert subprocess.run(command, pass_fds=[ear.fileno()], timeout=PATIENCE).returncode == 0


DRAWS = """
import os, random, sys
import numpy, torch
from zppo_actors.nursery import Request, become
numpy.random.rand(), torch.rand(1), random.random()
for _ in range(2):
    if not os.fork():
        env = {"OMP_NUM_THREADS": "3"}
        become(Request(["zppo_actors", "trainer"], env, sys.argv[1]))
        print(torch.get_num_threads(), torch.rand(1).item(), numpy.random.rand(), random.random())
        sys.exit()
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is a nursery on Linux only")
def test_forked_actors_have_threads_and_chance_of_their_own(tmp_path: Path) -> None:
    """Each says its threads, and a number of each general generator."""
    log = tmp_path / "log"
    command = [sys.executable, "-P", "-c", DRAWS, str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, timeout=PATIENCE).returncode == 0
    one, other = (line.split() for line in log.read_text().splitlines())
    assert one[0] == other[0] == "3"
    assert all(drawn != again for drawn, again in zip(one[1:], other[1:], strict=True))


@pytest.mark.slow
def test_an_actor_that_finds_a_driver_in_use_executes_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[Any] = []

    def execute(*command: Any) -> None:
        executed.append((*command, os.environ["ZPPO_TEST"]))
        raise SystemExit

    monkeypatch.setenv("ZPPO_TEST", "before")
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    command = ["/bin/python", "-P", "-m", "zppo_actors", "trainer"]
    with pytest.raises(SystemExit):
        inside.become(inside.Request(command, {"ZPPO_TEST": "after"}, str(tmp_path / "log")))
    assert executed == [("/bin/python", command, "after")]
