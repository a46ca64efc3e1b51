"""How the ranks of a trainer find each other, and how the first tells the others what to do.

They meet by a file in the runtime folder, which is the user's own (mode 0700), and talk by torch's
collectives over the loopback interface, on cards by NCCL. An order is a message of the protocol,
in its own encoding: the lengths of its frames, then the frames. Nothing is ever unpickled, so none
of torch's object collectives are used.

Invariant: every collective ends, with its result or with an error: `collective_seconds` bounds it,
and the end of any rank breaks it on all others.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from zppo.training.ranks import ALONE, Ranks
from zppo_actors.process import ActorContext
from zppo_protocol.codec import DEFAULT_LIMITS, decode, encode
from zppo_protocol.limits import MAX_FRAMES, Limits
from zppo_protocol.messages import AnyMessage

STORE = "ranks"
LOOPBACK = ("lo", "lo0")
LEFT = "left"
GRACE_SECONDS = 5.0
"""So long a rank that lost the others waits for the supervisor to end it, so that the process that
is the cause is the first to be seen dead."""

log = logging.getLogger("zppo.trainer")


class Meeting:
    """The line between the first rank and the others. Alone, there is nobody to tell."""

    def __init__(
        self, ranks: Ranks = ALONE, store: Store | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.ranks = ranks
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
        if self._store is not None and self._store.check([LEFT]):
            return 0
        log.error("another rank of the trainer has ended or does not answer")
        time.sleep(GRACE_SECONDS)
        return 1


def meet(context: ActorContext) -> Meeting:
    """Join the ranks of this attempt's trainer; returns when all are there.

    Raises DistStoreError or RuntimeError if they do not come within `collective_seconds`.
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
    _use_loopback()
    store = FileStore(str(context.runtime / STORE), len(devices))
    dist.init_process_group(
        backend,
        store=store,
        rank=context.index,
        world_size=len(devices),
        timeout=timedelta(seconds=trainer.collective_seconds),
    )
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    return Meeting(Ranks(context.index, mesh), store, context.limits)


def is_loss(error: Exception) -> bool:
    """Whether a collective has failed, which says nothing of this process."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
    )


def _broadcast(tensor: Tensor) -> None:
    dist.broadcast(tensor, 0)


def _use_loopback() -> None:
    """Let the collectives of this host listen nowhere else."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next(name for name in LOOPBACK if name in names)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = loopback
