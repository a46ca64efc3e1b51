"""Runs over several hosts, which are network namespaces of this machine: real processes, tcp with
CURVE, lines that are cut. Skipped where namespaces cannot be made; `tools/try_hosts.py` has longer
ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs_over_hosts import PATIENCE, Cluster

SETTINGS = {
    "scheduler.lease_seconds": 60,
    "actors.grader.hosts": "[n1]",
    "actors.teacher.hosts": "[n2]",
    "checkpoints.every": 2,
}

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, 3)
    yield cluster
    cluster.close()


def test_a_run_over_three_hosts_whose_parts_are_lost_and_come_back(cluster: Cluster) -> None:
    """A line is cut for less than a lease, an agent is killed and joins again, a line is cut for
    more than a lease: nothing is lost and nothing is trained twice. One host joins before the run
    is launched, the other after."""
    cluster.join(1)
    cluster.launch(**SETTINGS, **{"run.steps": 6, "cluster.lease_seconds": 20})
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
    cluster.join(1)  # first, so that it is there in time on a slow machine
    cluster.launch(**SETTINGS, **{"run.steps": 1, "cluster.join_seconds": 10})
    output = cluster.wait()
    assert cluster.launcher is not None and cluster.launcher.returncode == 2
    assert (
        "cluster.hosts: n2 did not join within 10 s (cluster.join_seconds); nothing was started"
        in output
    )
    said, _ = cluster.agents[1].communicate(timeout=PATIENCE)
    assert cluster.agents[1].returncode == 0 and said.endswith("n1: the run has ended\n")
