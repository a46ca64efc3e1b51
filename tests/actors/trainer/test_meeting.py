"""What the first rank of a trainer tells the others, between two processes."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from worlds import topology

from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.training.ranks import Ranks
from zppo_actors.process import ActorContext
from zppo_actors.runtime import MEETING_PORT
from zppo_actors.trainer.meeting import Meeting, _store, interface_of, kept_to
from zppo_protocol.codec import LARGE
from zppo_protocol.messages import AnyMessage, SaveCheckpoint, Shutdown, TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

PATIENCE = 600.0


def orders() -> list[AnyMessage | None]:
    """No frame, one, two, and as many as a window with large arrays has."""
    windows = [TrainWindow(step=1, groups=[_group(tokens)] * 3) for tokens in (5, LARGE // 4 + 1)]
    return [None, SaveCheckpoint(step=1), *windows, Shutdown(reason="done")]


def _group(tokens: int) -> TrainGroup:
    samples = GroupSamples(
        prompt_ids=np.arange(3, dtype=np.int32),
        token_ids=np.arange(tokens, dtype=np.int32),
        log_probs=-np.arange(tokens, dtype=np.float32),
        offsets=np.array([0, tokens], np.int32),
        version_spans=np.array([[tokens, 1]], np.int32),
        texts=[],
        finish_reasons=["stop"],
    )
    return TrainGroup("g", "q", "plain", samples, np.ones(1, np.float32))


def test_every_order_is_heard_as_it_was_told(tmp_path: Path) -> None:
    command = [sys.executable, "-P", __file__, str(tmp_path / "store")]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["heard"] * len(orders())), ended.stderr


# ---- over several hosts --------------------------------------------------------------------------


def two_hosts(**first: Any) -> Topology:
    """Ranks on two hosts; the first one is this one, unless it is given other facts."""
    hosts = {"node-0": {"address": "127.0.0.1", **first}, "node-1": {"address": "192.0.2.1"}}
    trainer = {"hosts": list(hosts), "ranks": 2}
    return topology(cluster={"hosts": hosts}, actors={"trainer": trainer})


def loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))


def test_collectives_run_on_the_interface_of_the_address_or_the_one_that_is_named() -> None:
    assert interface_of(topology(actors={"trainer": {"ranks": 2}}), 1) == loopback()
    assert interface_of(two_hosts(), 0) == loopback()
    assert interface_of(two_hosts(address="192.0.2.7", interface=loopback()), 0) == loopback()


def test_no_other_interface_of_a_like_name_is_used() -> None:
    """NCCL takes a name for a prefix unless `=` stands before it."""
    assert kept_to("eth1") == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}


def test_an_interface_that_is_not_there_is_named() -> None:
    names = ", ".join(name for _, name in socket.if_nameindex())
    with pytest.raises(UserError) as error:
        interface_of(two_hosts(interface="eth77"), 0)
    assert str(error.value) == (
        "cluster.hosts.node-0.interface is 'eth77'; expected a network interface of that host, "
        f"which has {names}"
    )
    with pytest.raises(UserError) as error:
        interface_of(two_hosts(), 1)
    assert str(error.value) == (
        "cluster.hosts.node-1.address is '192.0.2.1', which no network interface of that host has; "
        "expected its own address, or cluster.hosts.node-1.interface beside it"
    )
    with pytest.raises(UserError) as error:
        interface_of(two_hosts(address=None), 0)
    assert str(error.value) == (
        "cluster.hosts.node-0.address is null; expected an address, by which the ranks find each "
        "other"
    )


def test_ranks_meet_at_a_socket_that_was_bound_before_they_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that comes before the first is waited for. One of an earlier attempt, which has not heard
    of its end, says nothing to those of this one."""

    def rank(index: int, run_id: str, ear: int | None = None) -> Store:
        name = f"trainer-{index}" if index else "trainer"
        context = ActorContext(Path(), Path(), name, "rank", 0, two_hosts(), run_id, 0, ear=ear)
        return _store(context, 2, timedelta(seconds=PATIENCE))

    ear = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv(MEETING_PORT, str(ear.getsockname()[1]))
    with ThreadPoolExecutor() as pool:
        early = pool.submit(rank, 1, "run")
        while not select.select([ear], [], [], PATIENCE)[0]:
            pass
        first = rank(0, "run", ear.detach())
        second = early.result(PATIENCE)
    late = rank(1, "an earlier run")
    late.set("port", "of the late")
    first.set("who", "the first")
    assert second.get("who") == b"the first"
    assert not late.check(["who"]) and not second.check(["port"])


def main(store_file: str) -> None:
    """The first rank, and in a process forked from it the second, which compares."""
    rank = 0 if (other := os.fork()) else 1
    store = dist.FileStore(store_file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    meeting = Meeting(Ranks(rank, mesh), store)
    for order in orders():
        if rank == 0:
            meeting.tell(order)
        else:
            assert repr(meeting.hear()) == repr(order)
            print("heard", flush=True)
    if rank == 0:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1])
