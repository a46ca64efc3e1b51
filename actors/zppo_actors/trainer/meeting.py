"""How the ranks of a trainer find each other, and how the first tells the others what to do.

On one host they meet by a file in the runtime folder, which is the user's own (mode 0700), and talk
by torch's collectives over the loopback interface, on cards by NCCL. Over several hosts the first
rank keeps the store by which they meet, at the address of its host, and the collectives run on one
interface of each host: the one that `cluster.hosts` names, or that its address belongs to.

An order is a message of the protocol, in its own encoding: the lengths of its frames, then the
frames. Nothing is ever unpickled, so none of torch's object collectives are used.

Invariant: every collective ends, with its result or with an error: `collective_seconds` bounds it,
and the end of any rank breaks it on all others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.processes import host_name
from zppo.training.ranks import ALONE, Ranks
from zppo_actors.process import ActorContext
from zppo_actors.runtime import MEETING_PORT
from zppo_protocol.codec import DEFAULT_LIMITS, decode, encode
from zppo_protocol.limits import MAX_FRAMES, Limits
from zppo_protocol.messages import AnyMessage

STORE = "ranks"
LOOPBACK = ("lo", "lo0")
LEFT, RUN = "left", "run"
GRACE_SECONDS = 5.0
"""So long a rank that lost the others waits for the supervisor to end it, so that the process that
is the cause is the first to be seen dead."""

log = logging.getLogger("zppo.trainer")


class Meeting:
    """The line between the first rank and the others. Alone, there is nobody to tell."""

    def __init__(
        self,
        ranks: Ranks = ALONE,
        store: Store | None = None,
        limits: Limits = DEFAULT_LIMITS,
        run_dir: Path | None = None,
    ) -> None:
        self.ranks = ranks
        self.run_dir = run_dir
        """Where the first rank has the run, on a host that is not its own; None on its own."""
        self._store, self._limits = store, limits

    def tell(self, message: AnyMessage | None) -> None:
        """Give an order to all other ranks, which wait for it in `hear`; None: go on waiting."""
        if self._store is None:
            return
        frames = [] if message is None else encode(message, self._limits)
        lengths = [len(frame) for frame in frames] + [0] * (MAX_FRAMES - len(frames))
        _broadcast(torch.tensor(lengths))
        for frame in frames:
            _broadcast(torch.from_numpy(np.frombuffer(bytearray(frame), np.uint8)))

    def hear(self) -> AnyMessage | None:
        """The next order of the first rank."""
        lengths = torch.zeros(MAX_FRAMES, dtype=torch.int64)
        _broadcast(lengths)
        frames = [torch.empty(size, dtype=torch.uint8) for size in lengths.tolist() if size]
        for frame in frames:
            _broadcast(frame)
        parts = [frame.numpy().data for frame in frames]
        return decode(parts, self._limits) if parts else None

    def leave(self) -> None:
        """The first rank leaves where no other expects it: that is in order."""
        if self._store is not None:
            self._store.set(LEFT, "1")

    def lost(self) -> int:
        """Another rank has broken off: the exit code of this one, once there has been time to be
        ended with it."""
        if self._store is not None and _has_left(self._store):
            return 0
        log.error("another rank of the trainer has ended or does not answer")
        time.sleep(GRACE_SECONDS)
        return 1


def meet(context: ActorContext) -> Meeting:
    """Join the ranks of this attempt's trainer; returns when all are there.

    Raises UserError if this host has not the interface or address that it should have,
    DistStoreError or RuntimeError if the others do not come within `collective_seconds`.
    """
    trainer = context.topology.actors.trainer
    devices = trainer.rank_devices
    if len(devices) == 1:
        return Meeting()
    device = torch.device(devices[context.index])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    os.environ.update(kept_to(interface_of(context.topology, context.index)))
    limit = timedelta(seconds=trainer.collective_seconds)
    store = _store(context, len(devices), limit)
    run_dir = _run_dir(context, store)
    dist.init_process_group(
        backend, store=store, rank=context.index, world_size=len(devices), timeout=limit
    )
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    return Meeting(Ranks(context.index, mesh), store, context.limits, run_dir)


def is_loss(error: Exception) -> bool:
    """Whether a collective has failed, which says nothing of this process."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
    )


def _has_left(store: Store) -> bool:
    """Whether the first rank has left in order. Where it cannot be reached, it has not: a store
    behind a link that is cut does not answer, and is not waited for."""
    found: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            found.append(store.check([LEFT]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(GRACE_SECONDS)
    return found == [True]


def _broadcast(tensor: Tensor) -> None:
    dist.broadcast(tensor, 0)


def interface_of(topology: Topology, rank: int) -> str:
    """The network interface of this host on which its collectives run. Raises UserError if it is
    not there."""
    names = [name for _, name in socket.if_nameindex()]
    hosts = topology.actors.trainer.rank_hosts
    if len(set(hosts)) == 1:
        return next(name for name in LOOPBACK if name in names)
    host = host_name(topology, hosts[rank])
    facts = topology.cluster.hosts[host]
    if facts.interface is not None:
        if facts.interface not in names:
            raise UserError(
                f"cluster.hosts.{host}.interface is {facts.interface!r}; expected a network "
                f"interface of that host, which has {', '.join(names)}"
            )
        return facts.interface
    address = _resolved(f"cluster.hosts.{host}.address", facts.address)
    for name, addresses in psutil.net_if_addrs().items():
        if address in [found.address.partition("%")[0] for found in addresses]:
            return name
    raise UserError(
        f"cluster.hosts.{host}.address is {facts.address!r}, which no network interface of that "
        "host has; expected its own address, or cluster.hosts."
        f"{host}.interface beside it"
    )


def kept_to(interface: str) -> dict[str, str]:
    """The environment in which collectives use this interface alone. To NCCL a name without the
    sign is the beginning of names: eth1 would be eth10 as well."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def _store(context: ActorContext, count: int, limit: timedelta) -> Store:
    """What the ranks tell each other by before they can talk.

    Over several hosts it listens at a socket that the supervisor has bound, and for all attempts: a
    rank of an earlier one that has not heard of its end speaks of other keys."""
    topology = context.topology
    hosts = topology.actors.trainer.rank_hosts
    if len(set(hosts)) == 1:
        return FileStore(str(context.runtime / STORE), count)
    first = host_name(topology, hosts[0])
    where = topology.cluster.hosts[first].address
    address = _resolved(f"cluster.hosts.{first}.address", where)
    store = TCPStore(
        address,
        _port(context),
        count,
        is_master=context.ear is not None,
        timeout=limit,
        wait_for_workers=False,
        # Torch's own would listen at every address of the host.
        master_listen_fd=context.ear,
    )
    return PrefixStore(context.run_id, store)


def _port(context: ActorContext) -> int:
    """Where on the first host the ranks meet: the first one has the socket, others are told."""
    if context.ear is None:
        return int(os.environ[MEETING_PORT])
    ear = socket.socket(fileno=context.ear)
    port: int = ear.getsockname()[1]
    ear.detach()
    return port


def _run_dir(context: ActorContext, store: Store) -> Path | None:
    """The first rank says where the run is; ranks of its host know."""
    if context.index == 0:
        store.set(RUN, str(context.run_dir.resolve()))
    hosts = context.topology.actors.trainer.rank_hosts
    if hosts[context.index] == hosts[0]:
        return None
    return Path(store.get(RUN).decode())


def _resolved(where: str, address: str | None) -> str:
    """The IP address of a host, as this one knows it."""
    if address is None:
        raise UserError(f"{where} is null; expected an address, by which the ranks find each other")
    try:
        return str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"{where} is {address!r}, which names no host here ({error.strerror})"
        ) from error
