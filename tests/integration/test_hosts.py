"""Runs over several hosts, which are network namespaces of this machine: real processes, tcp with
CURVE, lines that are cut. Skipped where namespaces cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from namespaces import Network

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
PATIENCE = 900.0
SETTINGS = {
    "scheduler.new_questions": 8,
    "scheduler.lease_seconds": 60,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.hosts": "[n1]",
    "actors.grader.hosts": "[n1]",
    "actors.teacher.hosts": "[n2]",
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
    "checkpoints.every": 2,
}

pytestmark = pytest.mark.slow


class Cluster:
    """Three hosts; a run on the first, agents on the others."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(3)
        self.directory = folder / "run"
        self.keys = folder / "run.keys"
        self.launcher: subprocess.Popen[str] | None = None
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def launch(self, *words: str, **settings: Any) -> None:
        hosts = {f"n{i}": {"address": self.network.address(i)} for i in range(3)}
        chosen = {
            **SETTINGS,
            "cluster.hosts": json.dumps(hosts),
            "run.directory": self.directory,
            **settings,
        }
        command = [sys.executable, "-P", "-m", "zppo", "launch", *(words or (str(QUICKSTART),))]
        for name, value in chosen.items() if not words else settings.items():
            command += ["--set", f"{name}={value}"]
        self.launcher = self.network.start(
            0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def join(self, host: int) -> None:
        command = [sys.executable, "-P", "-m", "zppo", "join", "--key"]
        self.agents[host] = self.network.start(
            host,
            [*command, str(self.keys / f"n{host}.key"), "--wait", "300"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        assert self.launcher is not None
        while not condition():
            assert self.launcher.poll() is None, f"it ended early:\n{self.wait()}\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def steps(self) -> int:
        file = self.directory / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def log(self, name: str) -> str:
        file = self.directory / "logs" / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def logs(self) -> str:
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)

    def actor(self, name: str) -> psutil.Process | None:
        """A living process of this run by the name of its actor, on whatever host."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if name in line and "--actor" in line and self.is_ours(process):
                return process
        return None

    def is_ours(self, process: psutil.Process) -> bool:
        """Whether it descends from this test."""
        try:
            return psutil.Process() in process.parents()
        except psutil.Error:
            return False

    def wait(self) -> str:
        """Wait for the end of the run; what it has printed."""
        assert self.launcher is not None
        output, _ = self.launcher.communicate(timeout=PATIENCE)
        return output

    def finish(self) -> dict[str, Any]:
        """Wait for a good end everywhere; the summary of the report."""
        output = self.wait()
        assert self.launcher is not None
        assert self.launcher.returncode == 0, output + self.logs()
        for host, agent in self.agents.items():
            said, _ = agent.communicate(timeout=PATIENCE)
            assert agent.returncode == 0 and said.endswith(f"n{host}: the run has ended\n"), said
        assert not self.keys.exists()
        command = [sys.executable, "-P", "-m", "zppo.report", str(self.directory), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        summary: dict[str, Any] = json.loads(done.stdout)
        assert summary["trained_twice"] == 0 and summary["lost"] == 0
        return summary

    def close(self) -> None:
        for process in [self.launcher, *self.agents.values()]:
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
        self.network.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_a_run_over_three_hosts_whose_parts_are_lost_and_come_back(cluster: Cluster) -> None:
    """A line is cut for less than a lease, an agent is killed and joins again, a line is cut for
    more than a lease: nothing is lost and nothing is trained twice."""
    cluster.launch(**{"run.steps": 6, "cluster.lease_seconds": 20})
    cluster.join(1)
    cluster.join(2)
    cluster.until(lambda: cluster.steps() >= 1)
    before = cluster.actor("rollout-0")
    cluster.network.cut(1)
    time.sleep(2.0)
    cluster.network.restore(1)
    cluster.until(lambda: cluster.steps() >= 2)
    assert before is not None and before.is_running()

    gone = [cluster.actor("rollout-0"), cluster.actor("grader-0")]
    cluster.agents[1].kill()
    cluster.agents[1].communicate()
    psutil.wait_procs([process for process in gone if process is not None], timeout=PATIENCE)
    cluster.join(1)
    cluster.until(lambda: cluster.steps() >= 3)

    lost = cluster.actor("teacher-0")
    cluster.network.cut(2)
    assert lost is not None
    psutil.wait_procs([lost], timeout=PATIENCE)  # its own agent ends it
    cluster.until(lambda: "n2 was not heard for 23 s" in cluster.log("supervisor"))
    cluster.network.restore(2)
    summary = cluster.finish()
    assert summary["steps"] == 6
    assert "the agent of n1 was started anew" in cluster.log("supervisor")
    for name in ("rollout-0", "teacher-0", "grader-0"):
        assert cluster.actor(name) is None
        assert (cluster.directory / "timeline" / f"{name}.jsonl").read_bytes()


def test_a_run_whose_hosts_do_not_come_says_which(cluster: Cluster) -> None:
    cluster.launch(**{"run.steps": 1, "cluster.join_seconds": 15})
    cluster.join(1)
    output = cluster.wait()
    assert cluster.launcher is not None and cluster.launcher.returncode == 2
    assert (
        "cluster.hosts: n2 did not join within 15 s (cluster.join_seconds); nothing was started"
        in output
    )
    said, _ = cluster.agents[1].communicate(timeout=PATIENCE)
    assert cluster.agents[1].returncode == 0 and said.endswith("n1: the run has ended\n")
