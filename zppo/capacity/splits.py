"""How the engine processes of a topology can be shared out among the student and its teachers: the
same processes on the same devices, each pool with at least one, on every host the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise

from msgspec import structs

from zppo.config.served import ServedModel, served_student
from zppo.config.topology import OPENAI, ActorConfig, Topology
from zppo.plan.processes import asked_teachers, processes


def split_of(topology: Topology) -> dict[str, int]:
    """Pool -> engine processes. A teacher behind a server has none of these machines."""
    return {one.pool: one.actor.count for one in _pools(topology)}


def splits(topology: Topology) -> Iterator[dict[str, int]]:
    """Every way to share its engine processes out, as `split_of` has it, the given one among them.
    Where some run on a CPU and others on cards, on other hosts, or over several cards, none can do
    the work of another: only the given one."""
    given, places = split_of(topology), _places(topology)
    kinds = {device.partition(":")[0] for device in places}
    hosts = {tuple(one.actor.hosts) for one in _pools(topology)}
    spread = any(len(entry.cards) > 1 for entry in processes(topology, 1))
    if len(kinds) > 1 or len(hosts) > 1 or spread or len(given) == 1:
        yield given
        return
    for cuts in combinations(range(1, len(places)), len(given) - 1):
        counts = (high - low for low, high in pairwise([0, *cuts, len(places)]))
        each = len(next(iter(hosts)))
        yield {pool: each * count for pool, count in zip(given, counts, strict=True)}


def with_split(topology: Topology, split: Mapping[str, int]) -> Topology:
    """The topology with its engine processes shared out so."""
    places, actors = _places(topology), topology.actors
    more = list(topology.more_teachers)
    for one in _pools(topology):
        count = split[one.pool] // len(one.actor.hosts)
        devices, places = places[:count], places[count:]
        actor = _with_devices(one.actor, devices)
        if one.role == "rollout":
            actors = structs.replace(actors, rollout=actor)
        elif one.index == 0:
            actors = structs.replace(actors, teacher=actor)
        else:
            more[one.index - 1] = structs.replace(more[one.index - 1], actor=actor)
    return structs.replace(topology, actors=actors, more_teachers=more)


def changes(before: Topology, after: Topology) -> list[str]:
    """What to change to get from one to the other, as `setting=value`."""
    found = []
    for old, new in zip(_pools(before), _pools(after), strict=True):
        if old.actor.count != new.actor.count:
            found.append(f"{new.actor_path}.count={new.actor.count}")
        if old.actor.devices != new.actor.devices:
            found.append(f"{new.actor_path}.devices=[{', '.join(new.actor.devices)}]")
    bounds = [one.scheduler.max_staleness for one in (before, after)]
    if bounds[0] != bounds[1]:
        found.append(f"scheduler.max_staleness={bounds[1]}")
    return found


def _pools(topology: Topology) -> list[ServedModel]:
    asked = [one for one in asked_teachers(topology) if one.actor.engine != OPENAI]
    return [served_student(topology), *asked]


def _places(topology: Topology) -> list[str]:
    """The device of each engine process of a host, in the order of their pools."""
    return [
        one.device(i)
        for one in _pools(topology)
        for i in range(one.actor.count // len(one.actor.hosts))
    ]


def _with_devices(actor: ActorConfig, devices: list[str]) -> ActorConfig:
    """One process on each device of every host. Devices are given out in turn, so they are named up
    to where they begin again; where they do so otherwise a plan refuses the card named twice."""
    turns = range(1, len(devices) + 1)
    named = devices[: next((n for n in turns if devices == _in_turn(devices[:n], devices)), 0)]
    return structs.replace(actor, count=len(devices) * len(actor.hosts), devices=named)


def _in_turn(named: list[str], devices: list[str]) -> list[str]:
    return [named[i % len(named)] for i in range(len(devices))]
