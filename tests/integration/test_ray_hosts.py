"""A run whose further host is found by Ray: a cluster of two nodes, each in a network namespace.
Skipped where Ray is not installed (pip install 'zppo[ray]')."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from namespaces import Network

pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
RAY = Path(sys.executable).with_name("ray")
PATIENCE = 900.0

pytestmark = pytest.mark.slow


class RayCluster:
    """Two nodes of Ray; a run is launched on the first."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(2)
        self.directory = folder / "run"
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
        head = f"{self.network.address(0)}:6399"
        self._node(
            0, "--head", "--port=6399", "--include-dashboard=false", f"--temp-dir={self.temporary}"
        )
        self._node(1, f"--address={head}")

    def _node(self, host: int, *options: str) -> None:
        command = [str(RAY), "start", f"--node-ip-address={self.network.address(host)}", *options]
        command += ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
        started = self.network.start(
            host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        output, _ = started.communicate(timeout=PATIENCE)
        assert started.returncode == 0, output

    def launch(self, facts: str = "{}", seconds: int = 300) -> subprocess.Popen[str]:
        hosts = f"{{n0: {{address: {self.network.address(0)}}}, n1: {facts}}}"
        settings = {
            "cluster": f"{{launcher: ray, join_seconds: {seconds}, hosts: {hosts}}}",
            "actors.rollout.hosts": "[n1]",
            "actors.rollout.count": 1,
            "scheduler.new_questions": 8,
            "data.heldout": "null",
            "evaluation.every": "null",
            "run.steps": 4,
            "run.directory": self.directory,
        }
        command = [sys.executable, "-P", "-m", "zppo", "launch", str(QUICKSTART)]
        command += [word for item in settings.items() for word in ("--set", "{}={}".format(*item))]
        return self.network.start(
            0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def processes(self) -> list[psutil.Process]:
        """Everything that runs in the namespaces."""
        pids: list[str] = []
        for name in self.network.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            pids += listed.stdout.split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def named(self, *words: str) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            try:
                if set(words) <= set(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """Never `ray stop`, which ends every cluster of the machine."""
        for process in self.processes():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.network.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path)
    yield cluster
    cluster.close()


def test_a_seat_that_is_killed_is_taken_again(cluster: RayCluster) -> None:
    run = cluster.launch()
    metrics = cluster.directory / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or not metrics.read_text():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    [agent] = cluster.named("zppo_actors", "host")
    [rollout] = cluster.named("zppo_actors", "rollout")
    seat = agent.parent()
    assert seat is not None
    seat.kill()
    psutil.wait_procs([agent, rollout], timeout=PATIENCE)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    assert "the agent of n1 was started anew" in output
    assert "the seat of n1 is lost" in (cluster.directory / "logs" / "ray.log").read_text()
    assert cluster.named("zppo_actors") == []
    command = [sys.executable, "-P", "-m", "zppo.report", str(cluster.directory), "--json"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '"trained_twice": 0' in report and '"lost": 0' in report


def test_a_placement_without_room_says_what_there_is(cluster: RayCluster) -> None:
    run = cluster.launch("{cards: 8, card_gib: 80}", seconds=5)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2
    first, second = cluster.network.address(0), cluster.network.address(1)
    assert (
        "cluster.launcher ray: no room for n1 (1 CPU, 8 GPUs) within 5 s, each on a node of its own "
        "beside this one; the cluster has 2 nodes: "
    ) in output
    for address in (first, second):
        assert f"{address} (2 CPU, 0 GPUs)" in output
