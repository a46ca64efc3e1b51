"""Seats in a Ray cluster: on each further host one Ray actor, whose only work is to hold the host's
agent (`zppo join`), so that Ray decides where hosts are and ends them with the job.

Runs as a child of the supervisor, on a node of the cluster. Ray carries the paths of key files and
no key: the files lie on a file system that all hosts share. A seat's end is the end of its agent,
which is that of its actors; it is taken again `MOST_SEATS` times. Ray pickles what it sends and
authenticates nobody (SECURITY.md).

Produces: one line a seat on stderr. Waits for: the placement group, at most `--wait` seconds; then
for the end of a seat. Is unblocked by: the end of the supervisor.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from zppo.errors import EXIT_FAILED, UserError, first_line
from zppo.signals import die_with_parent
from zppo_actors.process import start_log

MOST_SEATS = 5
"""Times that one host's seat is taken before it is given up."""
NODE_SHARE = 0.001
"""Of a node's own resource, which names the node and has one unit."""

log = logging.getLogger("zppo.seats")


class Seat(Struct, frozen=True):
    """A host to be found: its key file, and the cards that it must have."""

    host: str
    key_file: str
    cards: int


def main(argv: Sequence[str]) -> int:
    """Hold the seats as `--seats JSON --wait SECONDS`; returns 0 when all agents have left, 1 when
    one is given up. Raises UserError where Ray cannot be had, or has no room."""
    die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(prog="python -m zppo_actors seats")
    parser.add_argument("--seats", required=True)
    parser.add_argument("--wait", required=True, type=float)
    asked = parser.parse_args(argv)
    start_log()
    seats = msgspec.json.decode(asked.seats, type=list[Seat])
    ray = connected()
    group = placed(ray, seats, asked.wait)
    return held(ray, group, seats, asked.wait)


def connected() -> Any:
    """Ray, as a driver of the cluster that this host is a node of. Raises UserError."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "cluster.launcher is 'ray', but Ray is not installed; expected: pip install 'zppo[ray]'"
        ) from None
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UserError(
            f"cluster.launcher is 'ray', but this host is no node of a Ray cluster "
            f"({first_line(error)}); expected: ray start --head here, and ray start "
            "--address=HOST:PORT on the other hosts"
        ) from None
    return ray


def placed(ray: Any, seats: Sequence[Seat], seconds: float) -> Any:
    """A placement group with a bundle for each seat, each on a node of its own that is not this
    one. Raises UserError if it is still pending after `seconds`."""
    from ray.util.placement_group import placement_group

    here = f"node:{ray.util.get_node_ip_address()}"
    bundles = [{here: NODE_SHARE}, *(bundle_of(seat) for seat in seats)]
    group = placement_group(bundles, strategy="STRICT_SPREAD", name="zppo")
    ready, _ = ray.wait([group.ready()], timeout=seconds)
    if not ready:
        raise UserError(pending(seats, seconds, [node for node in ray.nodes() if node["Alive"]]))
    return group


def bundle_of(seat: Seat) -> dict[str, float]:
    """What Ray is asked for: the seat itself takes one core, whatever its actors take."""
    return {"CPU": 1, **({"GPU": seat.cards} if seat.cards else {})}


def pending(seats: Sequence[Seat], seconds: float, nodes: Sequence[dict[str, Any]]) -> str:
    """The sentence for a placement that did not come about, with what there is."""
    wanted = ", ".join(
        f"{seat.host} (1 CPU{f', {seat.cards} GPUs' if seat.cards else ''})" for seat in seats
    )
    found = ", ".join(
        f"{node['NodeManagerAddress']} ({node['Resources'].get('CPU', 0):g} CPU, "
        f"{node['Resources'].get('GPU', 0):g} GPUs)"
        for node in nodes
    )
    return (
        f"cluster.launcher ray: no room for {wanted} within {seconds:g} s, each on a node of its "
        f"own beside this one; the cluster has {len(nodes)} nodes: {found}"
    )


def held(ray: Any, group: Any, seats: Sequence[Seat], wait_seconds: float) -> int:
    """Keep every seat taken until its agent leaves by itself."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def take(index: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index + 1)
        seat = seats[index]
        options = {"scheduling_strategy": strategy, "num_cpus": 1, "num_gpus": seat.cards}
        actor = ray.remote(Agent).options(**options).remote()
        return actor, actor.run.remote(seat.key_file, wait_seconds)

    sitting = {index: take(index) for index in range(len(seats))}
    taken = dict.fromkeys(sitting, 1)
    while sitting:
        [ended], _ = ray.wait([result for _, result in sitting.values()], num_returns=1)
        index = next(i for i, (_, result) in sitting.items() if result is ended)
        del sitting[index]
        if exit_code_of(ray, ended, seats[index]) == 0:
            continue
        if taken[index] == MOST_SEATS:
            log.error("%s is given up after %d seats", seats[index].host, MOST_SEATS)
            return EXIT_FAILED
        taken[index] += 1
        sitting[index] = take(index)
    return 0


def exit_code_of(ray: Any, ended: Any, seat: Seat) -> int:
    """How an agent ended; a seat that Ray has lost is a failure of it."""
    try:
        exit_code, last = ray.get(ended)
    except ray.exceptions.RayError as error:
        log.warning("the seat of %s is lost: %s", seat.host, first_line(error))
        return EXIT_FAILED
    log.info("the agent of %s ended with exit code %d: %s", seat.host, exit_code, last)
    return int(exit_code)


class Agent:
    """What a seat holds, in a process of Ray's."""

    def run(self, key_file: str, wait_seconds: float) -> tuple[int, str]:
        """Run the host's agent to its end; its exit code and last line."""
        command = [sys.executable, "-P", "-m", "zppo_actors", "host", "--key", key_file]
        agent = subprocess.Popen(
            [*command, "--wait", str(wait_seconds), "--tied"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last = ""
        assert agent.stdout is not None
        for line in agent.stdout:
            last = line.strip() or last
        return agent.wait(), last
