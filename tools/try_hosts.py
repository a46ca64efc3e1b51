"""Runs over several hosts in which something breaks, longer than tests may be: hosts are network
namespaces of this machine, everything else is real (processes, tcp with CURVE, weights carried).

    python -P tools/try_hosts.py [SCENARIO ...] [--folder DIR]

Needs root and iproute2; `clocks` needs time namespaces as well (Linux 5.6), `ray_head` and
`ray_node` need Ray (pip install 'zppo[ray]') in the environment that runs this. Each scenario ends
with what the report says of the run, or with an AssertionError that holds its logs.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

import psutil  # noqa: E402
from ray_cluster import RayCluster  # noqa: E402
from runs_over_hosts import PATIENCE, Cluster  # noqa: E402

from zppo.errors import Parser, UserError, nearest, run_command  # noqa: E402
from zppo.records import checkpoint  # noqa: E402
from zppo.records.run_directory import read, runtime_base, runtime_folder  # noqa: E402
from zppo.records.summary import summarise  # noqa: E402
from zppo.records.timeline import read_timeline  # noqa: E402

DAY = 86_400

Summary = dict[str, Any]


def ranks(folder: Path) -> Summary:
    """The trainer's second rank on another host is killed in the middle of a step, then the agent
    that runs it: each time the attempt ends and begins again from the checkpoint."""
    cluster = Cluster(folder, 2)
    try:
        cluster.launch(
            **{
                "actors.trainer.hosts": "[n0, n1]",
                "actors.trainer.ranks": 2,
                "checkpoints.every": 1,
                "run.steps": 5,
                "cluster.lease_seconds": 20,
            }
        )
        cluster.join(1)
        in_step(cluster, 1)
        named(cluster, "trainer-1").kill()
        cluster.until(lambda: "trainer-1 was killed by SIGKILL" in cluster.log("supervisor"))
        in_step(cluster, 2)
        cluster.agents[1].kill()
        cluster.agents[1].communicate()
        cluster.join(1)
        return finished(cluster)
    finally:
        cluster.close()


def slow(folder: Path) -> Summary:
    """All processes of a host stand still for two of every three seconds, its agent as well, and
    its line is down for half a second in every one of them."""
    cluster = Cluster(folder, 2)
    try:
        cluster.launch(**{"run.steps": 3, "cluster.lease_seconds": 20})
        cluster.join(1)
        cluster.until(lambda: cluster.steps() >= 1)
        until = time.monotonic() + 120.0
        while time.monotonic() < until and cluster.steps() < 3:
            there = of_host(cluster, 1)
            for process in there:
                process.suspend()
            cluster.network.cut(1)
            time.sleep(0.5)
            cluster.network.restore(1)
            time.sleep(1.5)
            for process in there:
                if process.is_running():
                    process.resume()
            time.sleep(1.0)
        return finished(cluster)
    finally:
        cluster.close()


def clocks(folder: Path) -> Summary:
    """Two hosts with clocks of their own: one three days ahead and long up, the other a day behind
    and just booted. Spans of all hosts lie where they belong."""
    cluster = Cluster(folder, 3)
    try:
        cluster.launch(
            **{"run.steps": 3, "actors.teacher.hosts": "[n2]", "cluster.lease_seconds": 20}
        )
        began = time.monotonic()
        cluster.join(1, clock_of(folder, "n1", wall=3 * DAY, monotonic=1_000_000))
        cluster.join(2, clock_of(folder, "n2", wall=-DAY, monotonic=-uptime() + 60))
        summary = finished(cluster)
        timeline = read_timeline(cluster.directory)
        assert timeline is not None
        assert timeline.seconds <= time.monotonic() - began, timeline.seconds
        by_name = {track.actor: track for track in timeline.tracks}
        trained = [span for span in by_name["trainer"].spans if span.kind == "train"]
        for name in ("rollout-0", "teacher-0"):
            first = next(span for span in by_name[name].spans if span.step == 0)
            assert first.end <= trained[0].end, f"{name} worked for a step that was over"
        return summary
    finally:
        cluster.close()


def ray_head(folder: Path) -> Summary:
    """Ray's head goes for good: the run says so, saves and ends, long before it would for lack of
    progress."""
    return given_up(folder, 0, "the process that holds the hosts has lost Ray")


def ray_node(folder: Path) -> Summary:
    """The node of a further host goes for good: Ray has no other, and the run ends as well."""
    return given_up(folder, 1, "n1 is given up")


def given_up(folder: Path, node: int, sentence: str) -> Summary:
    cluster = RayCluster(folder)
    try:
        run = cluster.launch(seconds=60, steps=1000)
        cluster.until_trained(run)
        for process in cluster.ray_of(node):
            process.kill()
        begun = time.monotonic()
        output, _ = run.communicate(timeout=PATIENCE)
        print(output[-2000:], f"ended after {time.monotonic() - begun:.0f} s", sep="\n")
        assert run.returncode == 1 and sentence in output, output
        assert cluster.named("zppo_actors") == []
        return summarise(cluster.directory)
    finally:
        cluster.close()


def in_step(cluster: Cluster, step: int) -> None:
    """Wait until a checkpoint of `step` is there and the trainer is at work on a later one."""
    cluster.until(lambda: checkpoint.find_latest(cluster.directory).step >= step)
    marker = runtime_folder(read(cluster.directory).run_id, runtime_base()) / "training"
    cluster.until(marker.exists)


def named(cluster: Cluster, name: str) -> psutil.Process:
    found = cluster.actor(name)
    assert found is not None, cluster.logs()
    return found


def of_host(cluster: Cluster, host: int) -> list[psutil.Process]:
    """An agent and all that it has started."""
    agent = psutil.Process(cluster.agents[host].pid)
    return [agent, *agent.children(recursive=True)]


def uptime() -> int:
    return round(time.monotonic())


def clock_of(folder: Path, host: str, wall: int, monotonic: int) -> list[str]:
    """A command that runs another on a machine that was booted at another time, and whose wall
    clock is wrong: `monotonic` and `wall` are seconds more than here."""
    boot, site = folder / f"{host}.boot", folder / host
    boot.write_text(f"the boot of {host}\n")
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import time\nright = time.time\ntime.time = lambda: right() + {wall}\n"
    )
    script = (
        'mount --bind "$0" /proc/sys/kernel/random/boot_id && '
        'export PYTHONPATH="$1:$PYTHONPATH" && shift && exec "$@"'
    )
    shifted = [f"--monotonic={monotonic}", f"--boottime={monotonic}"]
    inside = ["sh", "-c", script, str(boot), str(site)]
    return ["unshare", "--mount", "--time", *shifted, "--fork", "--kill-child=TERM", *inside]


def finished(cluster: Cluster) -> Summary:
    """The run ends well: nothing trained twice, nothing lost, no process left."""
    summary = cluster.finish()
    left = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    assert left == [], left
    return summary


SCENARIOS: dict[str, Callable[[Path], Summary]] = {
    "ranks": ranks,
    "slow": slow,
    "clocks": clocks,
    "ray_head": ray_head,
    "ray_node": ray_node,
}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--folder", type=Path, help="where the runs are left")
    asked = parser.parse_args()
    for name in asked.scenarios:
        if name not in SCENARIOS:
            raise UserError(f"there is no scenario {name!r}{nearest(name, SCENARIOS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = asked.folder or Path(tempfile.mkdtemp(prefix="zppo-hosts-"))
    for name in asked.scenarios or SCENARIOS:
        folder = base / name
        folder.mkdir(parents=True)
        begun = time.monotonic()
        summary = SCENARIOS[name](folder)
        told = ", ".join(f"{key} {summary[key]}" for key in ("steps", "trained_twice", "lost"))
        print(f"{name}: {told}; {time.monotonic() - begun:.0f} s; {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
