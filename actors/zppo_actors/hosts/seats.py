"""Seats in a Ray cluster: on each further host one Ray actor, whose only work is to hold the host's
agent (`zppo join`), so that Ray decides where hosts are and ends them with the job.

Runs as a child of the supervisor, on a node of the cluster. Ray carries the paths of key files and
no key: the files lie on a file system that all hosts share. A seat's end is the end of its agent,
which is that of its actors; it is taken again `MOST_SEATS` times. Ray pickles what it sends and
authenticates nobody (SECURITY.md).

Produces: one line a seat on stderr, and a last one that begins with `cluster.` where hosts cannot
be had any more. Waits for: the placement group and each seat, at most `--wait` seconds; then for
the end of a seat. Is unblocked by: the end of the supervisor.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
from msgspec import Struct

from zppo.config.cluster import RAY_HERE, Strategy
from zppo.errors import EXIT_FAILED, UserError, count_of, first_line
from zppo.signals import die_with_parent
from zppo_actors.own_time import Patience
from zppo_actors.process import start_log

MOST_SEATS = 5
"""Times that one host's seat is taken before it is given up."""
LOOK_SECONDS = 1.0
NODE_SHARE = 0.001
"""Of a node's own resource, which names the node and has one unit."""
OBJECT_BYTES = 80_000_000
"""Of Ray's object store in a cluster of our own, about the least it takes: nothing is put there."""
SPREAD = "STRICT_SPREAD"

log = logging.getLogger("zppo.seats")


class Seat(Struct, frozen=True):
    """A host to be found: its key file, and the cards that it must have."""

    host: str
    key_file: str
    cards: int


class GivenUp(Exception):
    """A host that is not to be had any more; carries the sentence."""


def main(argv: Sequence[str]) -> int:
    """Hold the seats as `--seats JSON --wait SECONDS --address RAY --strategy NAME`; returns 0 when
    all agents have left, 1 when one is given up. Raises UserError where Ray cannot be had, or has
    no room."""
    # Killed, it would leave helpers of a cluster of our own behind for a minute; Ray ends them.
    die_with_parent(signal.SIGTERM)
    parser = argparse.ArgumentParser(prog="python -m zppo_actors seats")
    parser.add_argument("--seats", required=True)
    parser.add_argument("--wait", required=True, type=float)
    parser.add_argument("--address", required=True)
    parser.add_argument("--strategy", required=True, choices=get_args(Strategy))
    asked = parser.parse_args(argv)
    start_log()
    seats = msgspec.json.decode(asked.seats, type=list[Seat])
    ray = connected(asked.address, len(seats))
    group = placed(ray, seats, asked.wait, asked.strategy)
    try:
        Holder(ray, group, seats, asked.wait).hold()
    except GivenUp as error:
        print(f"cluster.launcher ray: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return 0


def connected(address: str, seats: int) -> Any:
    """Ray, as a driver of the cluster that this host is a node of, or of one that is started here
    with room for so many seats. Raises UserError."""
    # Whoever started a cluster has been asked; ours tells nobody of itself.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "cluster.launcher is 'ray', but Ray is not installed; expected: pip install 'zppo[ray]'"
        ) from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address == RAY_HERE:
        os.umask(0o077)  # Ray writes a token of its own that everyone could read
        options |= {
            "num_cpus": seats,
            "include_dashboard": False,
            "object_store_memory": OBJECT_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.ray_address is {address!r}, but this host is no node of such a Ray cluster "
            f"({first_line(error)}); expected: ray start --head here, and ray start "
            "--address=HOST:PORT on the other hosts"
        ) from None
    return ray


def placed(ray: Any, seats: Sequence[Seat], seconds: float, strategy: str) -> Any:
    """A placement group with a bundle for each seat behind one for this node. Raises UserError if
    it is still pending after `seconds`."""
    from ray.util.placement_group import placement_group

    here = f"node:{ray.util.get_node_ip_address()}"
    bundles = [{here: NODE_SHARE}, *(bundle_of(seat) for seat in seats)]
    group = placement_group(bundles, strategy=strategy, name="zppo")
    ready, _ = ray.wait([group.ready()], timeout=seconds)
    if not ready:
        sentence = no_room(seats, seconds, living(ray), strategy)
        raise UserError(f"cluster.launcher ray: {sentence}")
    return group


def living(ray: Any) -> list[dict[str, Any]]:
    """The nodes that Ray has now."""
    return [node for node in ray.nodes() if node["Alive"]]


def bundle_of(seat: Seat) -> dict[str, float]:
    """What Ray is asked for: the seat itself takes one core, whatever its actors take."""
    return {"CPU": 1, **({"GPU": seat.cards} if seat.cards else {})}


def no_room(
    seats: Sequence[Seat], seconds: float, nodes: Sequence[dict[str, Any]], strategy: str
) -> str:
    """The sentence for a placement that did not come about, with what there is."""
    wanted = ", ".join(
        f"{seat.host} (1 CPU{f', {seat.cards} GPUs' if seat.cards else ''})" for seat in seats
    )
    found = ", ".join(
        f"{node['NodeManagerAddress']} ({node['Resources'].get('CPU', 0):g} CPU, "
        f"{node['Resources'].get('GPU', 0):g} GPUs)"
        for node in nodes
    )
    how = ", each on a node of its own beside this one" if strategy == SPREAD else ""
    count = count_of(len(nodes), "node")
    return f"no room for {wanted} within {seconds:g} s{how}; the cluster has {count}: {found}"


@dataclass
class Sitting:
    """A seat that was asked for. `there` and `ended` are Ray's promises: that it has begun, for
    which there is `patience`, and what has become of it."""

    actor: Any
    there: Any
    ended: Any
    patience: Patience
    begun: bool = False


class Holder:
    """Keeps every seat taken until its agent leaves by itself."""

    def __init__(self, ray: Any, group: Any, seats: Sequence[Seat], wait_seconds: float) -> None:
        self._ray, self._group, self._seats, self._wait_seconds = ray, group, seats, wait_seconds
        self._taken = [0] * len(seats)
        self._sitting = {index: self._take(index) for index in range(len(seats))}

    def hold(self) -> None:
        """Until all agents have left. Raises GivenUp."""
        while self._sitting:
            results = [sitting.ended for sitting in self._sitting.values()]
            ended, _ = self._ray.wait(results, num_returns=1, timeout=LOOK_SECONDS)
            for index in [i for i, sitting in self._sitting.items() if sitting.ended in ended]:
                self._replace(index)
            for index in self._sitting:
                self._look_for_pending(index)

    def _take(self, index: int) -> Sitting:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=index + 1
        )
        seat = self._seats[index]
        options = {"scheduling_strategy": strategy, "num_cpus": 1, "num_gpus": seat.cards}
        actor = self._ray.remote(Agent).options(**options).remote()
        self._taken[index] += 1
        there, ended = actor.begin.remote(), actor.run.remote(seat.key_file, self._wait_seconds)
        return Sitting(actor, there, ended, Patience(self._wait_seconds))

    def _replace(self, index: int) -> None:
        seat, ended = self._seats[index], self._sitting.pop(index).ended
        exit_code, how = end_of(self._ray, ended, seat)
        if exit_code == 0:
            return
        if self._taken[index] == MOST_SEATS:
            raise GivenUp(f"{seat.host} is given up after {MOST_SEATS} seats; the last one {how}")
        self._sitting[index] = self._take(index)

    def _look_for_pending(self, index: int) -> None:
        """Ray keeps a seat whose node is gone pending for as long as it takes."""
        sitting, seat = self._sitting[index], self._seats[index]
        if not sitting.begun:
            sitting.begun = bool(self._ray.wait([sitting.there], timeout=0)[0])
        if not sitting.begun and sitting.patience.over:
            # A seat that is taken again may go wherever its bundle does.
            raise GivenUp(
                f"{seat.host} is given up: "
                + no_room([seat], self._wait_seconds, living(self._ray), "")
            )


def end_of(ray: Any, ended: Any, seat: Seat) -> tuple[int, str]:
    """How an agent ended: its exit code, and in words. A seat that Ray has lost is a failure."""
    try:
        exit_code, last = ray.get(ended)
    except ray.exceptions.RayError as error:
        log.warning("the seat of %s is lost: %s", seat.host, first_line(error))
        return EXIT_FAILED, f"was lost by Ray ({first_line(error)})"
    log.info("the agent of %s ended with exit code %d: %s", seat.host, exit_code, last)
    return int(exit_code), f"ended with exit code {exit_code} ({last})"


class Agent:
    """What a seat holds, in a process of Ray's."""

    def begin(self) -> None:
        """Returns when the seat is there."""

    def run(self, key_file: str, wait_seconds: float) -> tuple[int, str]:
        """Run the host's agent to its end; its exit code and last line."""
        command = [sys.executable, "-P", "-m", "zppo_actors", "host", "--key", key_file]
        agent = subprocess.Popen(
            [*command, "--wait", str(wait_seconds), "--tied"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        last = ""
        assert agent.stdout is not None
        for line in agent.stdout:
            last = line.strip() or last
        return agent.wait(), last
