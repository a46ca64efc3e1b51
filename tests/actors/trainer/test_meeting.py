"""What the first rank of a trainer tells the others, between two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zppo.training.ranks import Ranks
from zppo_actors.trainer.meeting import Meeting
from zppo_protocol.codec import LARGE
from zppo_protocol.messages import AnyMessage, SaveCheckpoint, Shutdown, TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

PATIENCE = 300.0


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
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["heard"] * len(orders())), ended.stderr


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
