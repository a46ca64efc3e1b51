"""A run whose further host is found by Ray: a cluster of two nodes, each in a network namespace.
Skipped where Ray is not installed (pip install 'zppo[ray]'); `tools/try_hosts.py` has longer ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_cluster import RayCluster
from runs_over_hosts import PATIENCE

pytest.importorskip("ray", reason="Ray is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path)
    yield cluster
    cluster.close()


def test_a_seat_that_is_killed_is_taken_again(cluster: RayCluster) -> None:
    run = cluster.launch()
    cluster.until_trained(run)
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
