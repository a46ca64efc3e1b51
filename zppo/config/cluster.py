"""The hosts of a run and how its processes reach one another.

A topology without `cluster.hosts` runs on the host where it is launched, whose name is then
`localhost`. Otherwise the first host of the mapping is the controller's, and `localhost`, the
default of every `hosts`, is another name for it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, field

from zppo.config.base import Config, Port, Positive, PositiveFloat, Seconds

LOCALHOST = "localhost"
MOST_CARDS = 1024
"""Cards of a host, and of an engine that is spread over several."""
Launcher: TypeAlias = Literal["local", "ray", "render"]
Strategy: TypeAlias = Literal["STRICT_SPREAD", "PACK"]
RAY_HERE = "local"
"""Ray's own word for a cluster of this host alone that ends with the process that began it."""


class HostConfig(Config, frozen=True, kw_only=True):
    """A host. What it has is for the plan: what is not given is not checked before the run."""

    address: str | None = None
    """IP address or name under which the other hosts reach it"""
    interface: str | None = None
    """network interface of the trainer's collectives, e.g. eth1; null: that of the address"""
    cards: Annotated[int, Meta(ge=0, le=MOST_CARDS)] | None = None
    """GPUs"""
    card_gib: PositiveFloat | None = None
    """memory of each"""
    memory_gib: PositiveFloat | None = None
    """memory of the host"""
    shared_gib: PositiveFloat | None = None
    """size of /dev/shm; null: half of the memory, as Linux has it"""
    disk_gib: PositiveFloat | None = None
    """what is free where the run directory lies; of the first host alone"""
    cores: Positive | None = None
    """CPU cores"""


class ClusterConfig(Config, frozen=True, kw_only=True):
    launcher: Launcher = "local"
    """who starts processes on further hosts: local (zppo join, typed there), ray (a Ray cluster),
    render (a batch script or manifest)"""
    ray_address: str = "auto"
    """launcher ray: HOST:PORT of a cluster that this host is a node of; auto: the one that runs
    here; local: one that is started on this host for the run and ends with it"""
    strategy: Strategy = "STRICT_SPREAD"
    """launcher ray: STRICT_SPREAD gives each host a node of its own, PACK lets hosts share nodes"""
    hosts: dict[str, HostConfig] = field(default_factory=dict)
    """name → {address, interface, cards, card_gib, memory_gib, shared_gib, disk_gib, cores}
    (docs/clusters.md); the first one is the controller's; empty: this host alone"""
    port: Port | None = None
    """where the agents of further hosts reach the supervisor; null: any free one"""
    join_seconds: Seconds = 600.0
    """how long the run waits for its hosts before it begins"""
    lease_seconds: Seconds = 60.0
    """a host that is not heard for so long is lost: its processes end, and start again when it is
    back"""


class TransportConfig(Config, frozen=True, kw_only=True):
    """`ipc` on one host. Over several hosts it is `tcp`, always encrypted and authenticated
    (CURVE), with an allow-list of keys."""

    kind: Literal["ipc", "tcp"] | None = None
    """ipc (Unix sockets on this host) or tcp; null: tcp over several hosts, else ipc"""
    bind: str | None = None
    """tcp: address to listen on; null: that of the first host, or 127.0.0.1; all addresses of a
    host must be asked for: 0.0.0.0 or ::"""
    port: Port | None = None
    """tcp: port of the controller; null: any free one"""
    heartbeat_seconds: Annotated[float, Meta(ge=0.01, le=1e9)] = 1.0
    """how often actors report progress"""
    max_message_mib: Annotated[int, Meta(ge=1, le=2**20)] = 1024
    """largest message, in MiB; a whole window must fit"""
