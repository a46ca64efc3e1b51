"""Which process runs on which host and card, and what no cluster could run.

The rules: the hosts of a pool run equal blocks of its processes, in the order in which the setting
names them; each host gives out the pool's devices in turn; an engine of vLLM takes as many cards as
its `tensor_parallel_size`, from its device on, and shares them with nothing. `localhost` is the
first host. Nothing here looks at a machine or at the network.
"""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

from msgspec import Struct

from zppo.algorithm.methods import Method
from zppo.config.cluster import LOCALHOST, MOST_CARDS, RAY_HERE, HostConfig
from zppo.config.served import ServedModel, served_models
from zppo.config.topology import VLLM, Topology
from zppo.errors import UserError, nearest
from zppo.plan.processes import SPREAD, ProcessEntry, host_name, processes

_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
"""Names of hosts become names of files, arguments of commands and parts of dotted settings."""
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_DOMAIN_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?![._-]){_LABEL}(\.{_LABEL})*\.?")
"""Python's resolver raises no OSError for a part that is empty or longer."""
_RAY_ADDRESS = re.compile(r"auto|local|[A-Za-z0-9_.:\[\]][A-Za-z0-9_.:\[\]-]*:[0-9]{1,5}")
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]{0,8}))?", re.ASCII)
"""A card has one name, so that names can be compared; `cuda` is that of `cuda:0`."""
LOOPBACK = "127.0.0.1"


class Placed(Struct, frozen=True, kw_only=True):
    """What a setting places: its processes, and the hosts that it names."""

    path: str
    count_path: str
    count: int
    hosts: list[str]


def used_hosts(topology: Topology) -> list[str]:
    """Hosts that run a process, the controller's first."""
    return list(dict.fromkeys(entry.host for entry in processes(topology, 1)))


def transport_kind(topology: Topology) -> str:
    """`ipc` or `tcp`: what the settings say, else what the hosts need."""
    return topology.transport.kind or ("tcp" if len(used_hosts(topology)) > 1 else "ipc")


def bind_address(topology: Topology) -> str | None:
    """Where the controller listens with tcp: never on all addresses unless they are asked for. None
    where the launcher finds out on which addresses hosts are."""
    facts = topology.cluster.hosts.get(host_name(topology, LOCALHOST))
    found = topology.transport.bind or (facts.address if facts else None)
    return found or (None if len(used_hosts(topology)) > 1 else LOOPBACK)


def reached_at(topology: Topology) -> str | None:
    """Where actors reach what listens at `bind_address`; None where the launcher finds that out."""
    named = bind_address(topology)
    if named is None or not _is_wildcard(named):
        return named
    facts = topology.cluster.hosts.get(host_name(topology, LOCALHOST))
    found = facts.address if facts else None
    return found or (None if len(used_hosts(topology)) > 1 else LOOPBACK)


def check_reached(topology: Topology, named: str, address: str) -> None:
    """Raise UserError if what listens at `named` is reached from its own host alone and other hosts
    are to reach it. `address` is what the name stands for there, as far as that is known."""
    others = [name for name in used_hosts(topology)[1:] if _is_elsewhere(topology, name, named)]
    if not _is_loopback(address) or not others:
        return
    first = f"cluster.hosts.{host_name(topology, LOCALHOST)}.address"
    where = "transport.bind" if named == topology.transport.bind else first
    value = f"is {named!r}" + (f" ({address} there)" if address != named else "")
    raise UserError(
        f"{where} {value}, so {others[0]} cannot reach the controller; expected an address of the "
        "first host under which the other hosts reach it"
    )


def _is_elsewhere(topology: Topology, host: str, named: str) -> bool:
    """Whether a further host is another machine than the one that is `named`, as far as that is
    known: hosts may share a machine where a layout is tried out."""
    cluster = topology.cluster
    address = cluster.hosts[host].address
    if address is None:
        return cluster.launcher == "render" or cluster.strategy == "STRICT_SPREAD"
    return address != named and not _is_loopback(address)


def cards_of(topology: Topology, host: str) -> int:
    """GPUs that a host is to give the run: as many as it is said to have, or as the highest number
    asks for that its processes name."""
    facts = topology.cluster.hosts.get(host)
    if facts is not None and facts.cards:
        return facts.cards
    named = [
        int(card.removeprefix("cuda:"))
        for entry in processes(topology, 1)
        if entry.host == host
        for card in entry.cards
    ]
    return 1 + max(named, default=-1)


def check_placement(topology: Topology, method: Method) -> None:
    """Raise UserError for hosts and devices that cannot be laid out, whatever the machines are."""
    _check_names(topology)
    for placed in _placed(topology):
        _check_hosts(placed, topology)
    for one in served_models(topology):
        _check_devices(f"{one.actor_path}.devices", one.actor.devices)
        _check_spread(one)
    _check_trainer(topology)
    table = processes(topology, 1)
    _check_cards(table)
    _check_strategy(topology, table)
    _check_transport(topology)


def refuse_unbuilt(topology: Topology) -> None:
    """Raise UserError for what can be planned but not yet started."""
    if topology.cluster.launcher == "render":
        raise UserError(
            "cluster.launcher is 'render'; expected zppo render, which writes the job that "
            "launches the run, or cluster.launcher local"
        )


# ---- hosts ---------------------------------------------------------------------------------------


def _placed(topology: Topology) -> Iterator[Placed]:
    for one in served_models(topology):
        path, actor = one.actor_path, one.actor
        yield Placed(path=path, count_path="count", count=actor.count, hosts=actor.hosts)
    grader = topology.actors.grader
    yield Placed(path="actors.grader", count_path="count", count=grader.count, hosts=grader.hosts)
    trainer = topology.actors.trainer
    ranks = trainer.ranks or len(trainer.rank_devices)
    yield Placed(path="actors.trainer", count_path="ranks", count=ranks, hosts=trainer.hosts)


def _check_names(topology: Topology) -> None:
    for name, facts in topology.cluster.hosts.items():
        if name == LOCALHOST or not _HOST_NAME.fullmatch(name):
            raise UserError(
                f"cluster.hosts has a host {name!r}; expected a name of letters, digits, "
                "dashes and underscores, other than 'localhost'"
            )
        where = f"cluster.hosts.{name}"
        if facts.address is not None:
            _check_address(f"{where}.address", facts.address)
        if facts.address is not None and _is_wildcard(facts.address):
            raise UserError(
                f"{where}.address is {facts.address!r}; expected the address under which other "
                "hosts reach it"
            )
        check_cards_known(where, facts)


def check_cards_known(where: str, facts: HostConfig) -> None:
    """Raise UserError for cards of which nobody says how large they are."""
    if facts.cards and facts.card_gib is None:
        raise UserError(f"{where}.cards is {facts.cards}; expected card_gib beside it")


def _is_wildcard(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == LOCALHOST


def _check_address(where: str, address: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        # Names of the last part digits alone are mistyped addresses.
        named = _DOMAIN_NAME.fullmatch(address) and not address.rpartition(".")[2].isdigit()
        if not named:
            raise UserError(
                f"{where} is {address!r}; expected an IP address or the name of a host, without a "
                "port"
            ) from None


def _check_hosts(placed: Placed, topology: Topology) -> None:
    known, where = topology.cluster.hosts, f"{placed.path}.hosts"
    if not placed.hosts:
        raise UserError(f"{where} is empty; expected at least one host, such as localhost")
    for host in placed.hosts:
        if host != LOCALHOST and host not in known:
            hint = nearest(host, known) if known else " (there is none: cluster.hosts is empty)"
            raise UserError(
                f"{where} names {host!r}; expected localhost or a host of cluster.hosts{hint}"
            )
    names = [host_name(topology, host) for host in placed.hosts]
    for host, name in zip(placed.hosts, names, strict=True):
        if names.count(name) > 1:
            first = f", which is {name!r}," if host != name else ""
            raise UserError(f"{where} names {host!r}{first} twice; expected each host once")
    if placed.count % len(names):
        raise UserError(
            f"{placed.path}.{placed.count_path} is {placed.count} over {len(names)} hosts; "
            f"expected a multiple of {len(names)}, because each host runs an equal part"
        )


# ---- devices -------------------------------------------------------------------------------------


def _check_devices(where: str, devices: list[str]) -> None:
    if not devices:
        raise UserError(f"{where} is empty; expected at least one device, such as cpu or cuda:0")
    for device in devices:
        _check_device(where, device)
        if device != "cpu" and [*map(_card, devices)].count(_card(device)) > 1:
            raise UserError(
                f"{where} names {device!r} twice; expected each card once (count gives more "
                "processes, and devices are given out in turn)"
            )


def _check_device(where: str, device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise UserError(f"{where} names {device!r}; expected cpu, cuda or cuda:N")


def _card(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _check_spread(one: ServedModel) -> None:
    """Cards are laid out by this argument, so it is not left to vLLM to say what is wrong."""
    size = one.actor.engine_args.get(SPREAD, 1)
    counts = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MOST_CARDS
    if one.actor.engine == VLLM and not counts:
        raise UserError(
            f"{one.actor_path}.engine_args.{SPREAD} is {size!r}; expected a whole number from 1 to "
            f"{MOST_CARDS}"
        )


def _check_trainer(topology: Topology) -> None:
    """Every rank of the trainer has a device, and a card of its own."""
    trainer, hosts = topology.actors.trainer, topology.actors.trainer.hosts
    if trainer.devices and trainer.device != "cpu":
        raise UserError(
            f"actors.trainer.device is {trainer.device!r} beside actors.trainer.devices; expected "
            "one of the two"
        )
    for device in trainer.host_devices:
        _check_device(f"actors.trainer.device{'s' if trainer.devices else ''}", device)
    ranks, devices = trainer.ranks, trainer.host_devices
    if ranks is not None and len(trainer.rank_devices) != ranks:
        each = f" on each of {len(hosts)} hosts" if len(hosts) > 1 else ""
        raise UserError(
            f"actors.trainer.ranks is {ranks}, but actors.trainer.devices names {len(devices)}"
            f"{each}; expected one for each rank, or cpu alone for all"
        )
    first = host_name(topology, LOCALHOST)
    if host_name(topology, hosts[0]) != first:
        raise UserError(
            f"actors.trainer.hosts begins with {hosts[0]!r}; expected {first!r}, the first of "
            "cluster.hosts, because the first rank writes checkpoints into run.directory"
        )
    if len(trainer.rank_devices) > 1:
        _check_ranks(topology)


def _check_ranks(topology: Topology) -> None:
    trainer, devices = topology.actors.trainer, topology.actors.trainer.host_devices
    # Ranks hear from the first at every heartbeat, whether there is work or not.
    beats = 2 * topology.transport.heartbeat_seconds
    if trainer.collective_seconds <= beats:
        raise UserError(
            f"actors.trainer.collective_seconds is {trainer.collective_seconds:g}; expected more "
            f"than {beats:g}, two of transport.heartbeat_seconds"
        )
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise UserError(
            f"actors.trainer.devices names {', '.join(dict.fromkeys(devices))}; expected cards "
            "alone, or cpu alone, because the ranks share one model"
        )
    if devices[0] == "cpu":
        return
    for device in devices:
        if devices.count(device) > 1:
            raise UserError(
                f"actors.trainer.devices has {device!r} for {devices.count(device)} ranks; "
                "expected a card of its own for each, such as cuda:0 and cuda:1"
            )
        if ":" not in device and len(devices) > 1:
            raise UserError(
                f"actors.trainer.devices names {device!r} beside others; expected its number as "
                "well, such as cuda:0"
            )


def _check_cards(table: list[ProcessEntry]) -> None:
    """An engine over several cards shares none of them; what shares one card is a question of
    memory."""
    on_card: dict[tuple[str, str], list[ProcessEntry]] = defaultdict(list)
    for entry in table:
        for card in entry.cards:
            on_card[entry.host, card].append(entry)
    for (host, card), entries in on_card.items():
        wide = next((entry for entry in entries if len(entry.cards) > 1), None)
        if wide is not None and len(entries) > 1:
            other = next(entry for entry in entries if entry is not wide)
            where = "" if host == LOCALHOST else f" of {host!r}"
            raise UserError(
                f"{card}{where} is given to {wide.name}, an engine over {wide.cards[0]} to "
                f"{wide.cards[-1]} (tensor_parallel_size {len(wide.cards)}), and to {other.name}; "
                "expected cards of its own for such an engine"
            )


def _check_strategy(topology: Topology, table: list[ProcessEntry]) -> None:
    """Which Ray cluster it is, and hosts that share its nodes."""
    cluster = topology.cluster
    if cluster.launcher != "ray":
        return
    if not _RAY_ADDRESS.fullmatch(cluster.ray_address):
        raise UserError(
            f"cluster.ray_address is {cluster.ray_address!r}; expected auto, local or HOST:PORT"
        )
    if cluster.strategy == "STRICT_SPREAD":
        if cluster.ray_address == RAY_HERE:
            raise UserError(
                "cluster.ray_address is 'local', a Ray cluster of this host alone; expected "
                "cluster.strategy PACK beside it, or the address of a cluster with more nodes"
            )
        return
    first = host_name(topology, LOCALHOST)
    on_card = next((entry for entry in table if entry.host == first and entry.cards), None)
    if on_card is not None:
        raise UserError(
            f"cluster.strategy is 'PACK', but {on_card.name} runs on {on_card.device} of "
            f"{first!r}; expected STRICT_SPREAD, because Ray gives out the cards of a node without "
            "knowing which of them a process of the first host uses"
        )


# ---- transport -----------------------------------------------------------------------------------


def _check_transport(topology: Topology) -> None:
    transport, hosts = topology.transport, used_hosts(topology)
    if transport.kind == "ipc" and len(hosts) > 1:
        raise UserError(
            f"transport.kind is 'ipc', but processes run on {len(hosts)} hosts; expected tcp or "
            "null"
        )
    for name in ("bind", "port"):
        value = getattr(transport, name)
        if value is not None and transport_kind(topology) == "ipc":
            raise UserError(f"transport.{name} is {value!r}; expected null, or kind tcp beside it")
    if transport.bind is not None:
        _check_address("transport.bind", transport.bind)
    _check_ports(topology)
    if len(hosts) > 1 and topology.cluster.launcher == "local":
        for name in hosts:
            if topology.cluster.hosts[name].address is None:
                raise UserError(
                    f"cluster.hosts.{name}.address is missing; expected the IP address or name "
                    "under which the other hosts reach it"
                )
    if (reached := reached_at(topology)) is not None:
        check_reached(topology, reached, reached)


def _check_ports(topology: Topology) -> None:
    """What listens on the first host has a port of its own."""
    ports = {
        "transport.port": topology.transport.port,
        "cluster.port": topology.cluster.port,
        "actors.trainer.port": topology.actors.trainer.port,
    }
    given = [(name, port) for name, port in ports.items() if port is not None]
    for (name, port), (other, another) in combinations(given, 2):
        if port == another:
            raise UserError(
                f"{name} and {other} are both {port}; expected a port of its own for each, or null"
            )
