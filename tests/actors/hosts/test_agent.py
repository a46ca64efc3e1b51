"""The host agent as a real process on a real socket, with real actors; the test is the supervisor."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import msgspec
import psutil
import pytest
from living import is_living
from supervisor_helpers import Lines

from zppo.config.cluster import ClusterConfig, HostConfig
from zppo.config.topology import DataConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo.records import run_directory
from zppo.records.clocks import read_clocks
from zppo.records.run_directory import runtime_base, runtime_prefix
from zppo.records.timeline import TIMELINE
from zppo.signals import Interrupts
from zppo_actors import timeline
from zppo_actors.own_time import Patience
from zppo_actors.supervisor import fleet as fleets
from zppo_actors.supervisor import gathering
from zppo_actors.supervisor.children import Child, spawn
from zppo_actors.supervisor.fleet import Fleet, versions
from zppo_actors.supervisor.gathering import (
    LIMITS,
    ROLE,
    Interrupted,
    let_go,
    looked_up,
    wait_for_all,
)
from zppo_protocol import keys
from zppo_protocol.keys import SecretKey
from zppo_protocol.sockets import Router

PATIENCE_SECONDS = 600.0
HOST = "node-1"
LEASE_SECONDS = 8.0

pytestmark = pytest.mark.slow


class Stage:
    """A run directory, the supervisor's socket for host agents, and agents of one host."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        topology = Topology(data=DataConfig(train="unused"), student=StudentConfig(model="unused"))
        self.run = folder / "run"
        self.record = run_directory.create(self.run, topology)
        # Not in pytest's own folder: the path of a socket in it would be too long.
        self.base = Path(tempfile.mkdtemp(prefix="zppo-hosts-"))
        monkeypatch.setenv("ZPPO_RUNTIME_DIR", str(self.base))
        sockets = folder / "sockets"
        sockets.mkdir(mode=0o700)
        access, self.credentials = keys.issue(f"ipc://{sockets / 'hosts.sock'}", {HOST: ROLE})
        self.key = keys.key_file(folder / "keys", HOST)
        keys.write_credentials(self.key, self.credentials[HOST])
        self.actors_access, self.actors = keys.issue(
            f"ipc://{sockets / 'controller.sock'}", {"grader-0": "grader"}
        )
        self.router = Router(access, LIMITS)
        self.folders: dict[str, str] = {}
        self.versions = versions()
        self.said: list[str] = []
        self.agents: list[subprocess.Popen[str]] = []

    def open(self, lease_seconds: float = PATIENCE_SECONDS) -> None:
        self.fleet = Fleet(
            self.router, {HOST: self.folders}, self.versions, self.run, lease_seconds
        )

    def join(self, wait_seconds: float = PATIENCE_SECONDS) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "zppo_actors", "host"]
        agent = subprocess.Popen(
            [*command, "--key", str(self.key), "--wait", str(wait_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.agents.append(agent)
        return agent

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.said, self.logs())
            self.said += self.fleet.turn()
            time.sleep(0.05)

    def begin(self, attempt: str = "attempt1", *, secrets: bool = True) -> None:
        self.until(lambda: self.fleet.is_there(HOST))
        secret = keys.pack_credentials(self.actors["grader-0"])
        own = {HOST: {"grader-0": secret}} if secrets else {}
        self.fleet.begin(attempt, msgspec.json.encode(self.record), own)

    def grader(self, incarnation: int = 0) -> Child:
        return self.fleet.start(
            HOST,
            name="grader-0",
            role="grader",
            incarnation=incarnation,
            log=self.run / "logs" / "grader-0.log",
            env={"OMP_NUM_THREADS": "1"},
        )

    def running(self) -> list[psutil.Process]:
        """The graders of this test, wherever they hang in the tree."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "grader" in line and any(str(self.base) in word for word in line):
                found.append(process)
        return [process for process in found if is_living(process)]

    def logs(self) -> str:
        return "".join(log.read_text() for log in (self.run / "logs").glob("*.log"))

    def close(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.wait()
            assert agent.stdout is not None
            agent.stdout.close()
        self.router.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        shutil.rmtree(self.base)
        assert left == []


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(fleets, "BEAT_SECONDS", 0.2)
    stage = Stage(tmp_path, monkeypatch)
    yield stage
    stage.close()


def test_an_actor_of_another_host_lives_dies_and_is_heard_of(stage: Stage) -> None:
    stage.open()
    agent = stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    stage.until(lambda: child.process.used({})[0] > 0)
    stage.running()[0].kill()
    stage.until(lambda: child.ended)
    assert child.verdict == "grader-0 was killed by SIGKILL"
    child.kill()
    second = stage.grader(incarnation=1)
    stage.until(lambda: len(stage.running()) == 1)
    second.kill()
    stage.until(lambda: second.ended)
    assert second.verdict == "grader-0 was killed by SIGKILL" and stage.running() == []
    assert stage.fleet.end(PATIENCE_SECONDS) == []
    assert list(stage.base.iterdir()) == []  # the runtime folder is gone
    stage.fleet.dismiss()
    assert agent.wait(PATIENCE_SECONDS) == 0
    assert agent.communicate()[0].endswith("node-1: the run has ended\n")


def test_the_last_words_of_an_actor_come_with_its_exit_code(stage: Stage) -> None:
    stage.open()
    stage.join()
    stage.begin(secrets=False)
    child = stage.grader()
    stage.until(lambda: child.ended)
    assert child.exit_code == 2
    assert child.log.read_text().rstrip().endswith("No such file or directory")


def test_an_agent_that_is_killed_takes_its_actors_along_and_may_come_back(stage: Stage) -> None:
    stage.open()
    first = stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    first.kill()
    stage.until(lambda: stage.running() == [])
    stage.join()
    stage.until(lambda: child.ended)
    assert child.process.reason == "the agent of node-1 was started anew"
    stage.until(lambda: stage.fleet.is_there(HOST))
    child.kill()
    stage.grader(incarnation=1)
    stage.until(lambda: len(stage.running()) == 1)
    assert len(list(stage.base.iterdir())) == 1  # what the first had left is swept


def test_an_agent_that_does_not_come_back_is_lost_after_a_lease(stage: Stage) -> None:
    stage.open(LEASE_SECONDS)
    agent = stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    agent.kill()
    stage.until(lambda: child.ended)
    assert child.process.reason == f"node-1 was not heard for {LEASE_SECONDS + 0.6:g} s"
    assert not stage.fleet.is_there(HOST)


def test_nothing_runs_for_a_supervisor_that_is_not_heard(stage: Stage) -> None:
    """It stops speaking for more than a lease, then goes on; so it is after a cut of the line."""
    stage.open(LEASE_SECONDS)
    agent = stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while stage.running() or list(stage.base.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert agent.poll() is None
    stage.until(lambda: child.ended and stage.fleet.is_there(HOST))
    child.kill()
    stage.grader(incarnation=1)
    stage.until(lambda: len(stage.running()) == 1)


def test_an_interrupted_agent_says_so_and_ends_its_actors(stage: Stage) -> None:
    stage.open()
    agent = stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(PATIENCE_SECONDS) == 130
    stage.until(lambda: child.ended)
    assert child.process.reason == "the agent of node-1 has left: it was stopped there"
    assert stage.running() == [] and list(stage.base.iterdir()) == []


def test_a_key_that_a_killed_run_has_left_is_replaced(stage: Stage, tmp_path: Path) -> None:
    """A scheduler starts both at once, so the agent may find the old file first."""
    sockets = tmp_path / "old"
    sockets.mkdir(mode=0o700)
    access, old = keys.issue(f"ipc://{sockets / 'hosts.sock'}", {HOST: ROLE})
    keys.write_credentials(stage.key, old[HOST])
    earlier = Router(access, LIMITS)
    stage.open()
    stage.join()
    assert earlier.receive(PATIENCE_SECONDS) is not None
    earlier.close()
    keys.write_credentials(stage.key, stage.credentials[HOST])
    stage.until(lambda: stage.fleet.is_there(HOST))


def test_a_key_that_is_refused_is_waited_over(stage: Stage) -> None:
    """The next run listens where the killed one did, and has not replaced its file yet."""
    keys.write_credentials(stage.key, replace(stage.credentials[HOST], secret=SecretKey.new()))
    stage.open()
    agent, hasty = stage.join(), stage.key.with_name("hasty.key")
    stage.until(lambda: stage.router.refused > 0)
    assert agent.poll() is None
    shutil.copy(stage.key, hasty)
    keys.write_credentials(stage.key, stage.credentials[HOST])
    stage.until(lambda: stage.fleet.is_there(HOST))

    stage.key = hasty
    given_up = stage.join(wait_seconds=5.0)
    assert given_up.wait(PATIENCE_SECONDS) == 2
    sentence = (
        f"the controller at {stage.credentials[HOST].address} does not let {HOST} in: its key is "
        "not one of this life of the run (ZAP status 400)"
    )
    said = given_up.communicate()[0]
    assert f"{sentence}; waiting for another key file or controller\n" in said
    assert said.endswith(f"\n{sentence}\n")


def test_a_second_agent_of_a_host_is_refused_and_the_first_goes_on(stage: Stage) -> None:
    """They would take the host from each other, a lease long each."""
    stage.open()
    stage.join()
    stage.begin()
    child = stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    second = stage.join()
    assert second.wait(PATIENCE_SECONDS) == 2
    assert second.communicate()[0].endswith(
        f"zppo join: --key {str(stage.key)!r} is used by another zppo join; expected one for each "
        "host, with that host's own file\n"
    )
    seconds = child.process.used({})[0]
    stage.until(lambda: child.process.used({})[0] > seconds)
    assert not child.ended and stage.fleet.is_there(HOST)


def test_another_version_is_refused(stage: Stage) -> None:
    stage.versions["Python"] = "3.99.0"
    stage.open()
    agent = stage.join()
    sentence = (
        f"node-1 has Python {versions()['Python']}, the controller's host has 3.99.0; install the "
        "same there"
    )
    stage.until(lambda: agent.poll() is not None)
    assert agent.returncode == 2 and agent.communicate()[0].endswith(f"{sentence}\n")
    assert stage.said[0] == sentence


def test_a_model_folder_that_is_missing_or_differs_is_named(stage: Stage, tmp_path: Path) -> None:
    other = tmp_path / "model"
    other.mkdir()
    for folder, sentence in (
        (
            str(tmp_path / "none"),
            f"the model folder {str(tmp_path / 'none')!r} cannot be read on this host (No such file "
            "or directory); expected the same folder as on the controller's host, under the same "
            "path",
        ),
        (
            str(other),
            f"the model folder {str(other)!r} of this host holds another model than that of the "
            "controller's host; expected a copy of it",
        ),
    ):
        stage.folders = {folder: "0" * 64}
        stage.open()
        agent = stage.join()
        stage.until(lambda agent=agent: agent.poll() is not None)
        assert agent.returncode == 2 and agent.communicate()[0].endswith(f"{sentence}\n")
        stage.until(lambda: bool(stage.fleet.missing()[HOST]))
        assert stage.fleet.missing() == {HOST: f"the agent of node-1 has left: {sentence}"}


def test_the_clock_of_a_host_is_known_from_its_reports(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this process were of another boot than the agent's. Both read one clock in fact, so
    what is found is the time that a report took."""
    theirs = timeline.boot()
    monkeypatch.setattr(timeline, "boot", lambda: "ours")
    stage.open()
    stage.join()
    stage.until(lambda: theirs in read_clocks(stage.run / TIMELINE))
    found = read_clocks(stage.run / TIMELINE)[theirs]
    assert found.boot == "ours" and 0.0 <= found.seconds < PATIENCE_SECONDS


def test_a_key_file_that_does_not_come_is_not_waited_for_any_longer(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "zppo", "join", "--key", str(tmp_path / "k.key")]
    done = subprocess.run([*command, "--wait", "0.5"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"zppo join: --key {str(tmp_path / 'k.key')!r} was not there within 0.5 s; expected the "
        "file that zppo launch writes for this host\n",
    )


def test_a_wait_that_is_none_is_refused() -> None:
    command = [sys.executable, "-P", "-m", "zppo", "join", "--key", "k", "--wait", "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "zppo join: argument --wait: '-1' is not a number of seconds above 0, at most 1e9; see "
        "zppo join --help\n",
    )


def test_the_runtime_folder_of_a_host_is_one_that_a_sweep_knows(stage: Stage) -> None:
    stage.open()
    stage.join()
    stage.begin()
    stage.grader()
    stage.until(lambda: len(stage.running()) == 1)
    [folder] = runtime_base().iterdir()
    assert folder.name == f"{runtime_prefix()}attempt1-node-1"
    assert os.stat(folder).st_mode & 0o777 == 0o700


def test_hosts_that_do_not_join_are_named_and_ctrl_c_ends_the_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.open()
    with pytest.raises(UserError) as caught:
        wait_for_all(stage.fleet, 0.1, Lines(), Interrupts())
    assert str(caught.value) == (
        "cluster.hosts: node-1 did not join within 0.1 s (cluster.join_seconds); nothing was "
        "started"
    )
    facts = {HOST: HostConfig(address="no-such.invalid"), "node-2": HostConfig(address="127.0.0.1")}
    topology = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        cluster=ClusterConfig(hosts=facts),
    )
    nameless, view = looked_up(topology, facts), Lines()
    stage.until(lambda: HOST in nameless)
    with pytest.raises(UserError) as caught:
        wait_for_all(stage.fleet, 0.1, view, Interrupts(), nameless)
    why = "its address 'no-such.invalid' names no host here: "
    assert str(caught.value).startswith(f"cluster.hosts: node-1 ({why}")
    [warning] = view.lines
    assert warning.startswith(f"warning: node-1: {why}")
    answer = threading.Event()

    def slow(*_: object, **__: object) -> None:
        answer.wait(PATIENCE_SECONDS)
        raise OSError(0, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert looked_up(topology, facts) == {}  # whoever asks does not wait for the resolver
    answer.set()
    interrupts = Interrupts()
    interrupts.count = 1
    with pytest.raises(Interrupted):
        wait_for_all(stage.fleet, PATIENCE_SECONDS, Lines(), interrupts)


def test_a_standstill_is_no_waiting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day of it, by the clock, in each wait for hosts: those that were let go leave after it, and
    those that are to join may."""

    def clock() -> Callable[[], float]:
        return chain([0.0, 0.0], repeat(86_400.0)).__next__

    monkeypatch.setattr(gathering, "Patience", lambda seconds: Patience(seconds, clock()))
    stage.open()
    stage.join()
    wait_for_all(stage.fleet, PATIENCE_SECONDS, Lines(), Interrupts())
    assert stage.fleet.missing() == {}

    seats = spawn(
        ["sh", "-c", "sleep 0.5; exit 3"],
        name="ray",
        role="ray",
        incarnation=0,
        log=stage.run / "logs" / "ray.log",
        env={},
        inherited=(),
    )
    let_go(seats)
    assert seats.exit_code == 3
