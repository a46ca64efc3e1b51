"""One rank of a trainer on a host of its own: `python ranks_over_hosts.py RANK FOLDER`.

The first binds a port, as the supervisor does, and says so in FOLDER. It meets the others as the actor does, by the topology of `topology`, trains the case, and the first
leaves the outcome in FOLDER. Then all go on adding up numbers until the link is cut, and end as the
actor would: the exit code is that of `Meeting.lost`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from trainer_ranks import Case, train

from zppo.config.method import MethodConfig
from zppo.config.topology import Topology
from zppo.records.atomic_file import written_whole
from zppo_actors.process import ActorContext
from zppo_actors.runtime import MEETING_PORT
from zppo_actors.supervisor.listening import of_ranks
from zppo_actors.trainer.meeting import is_loss, meet

ADDRESSES = ("10.213.7.1", "10.213.7.2")
LIMIT_SECONDS = 40.0
CASE = Case(method=MethodConfig(updates_per_step=2), groups=20, last=1)


def topology() -> Topology:
    """Two hosts, a rank on each."""
    hosts = {f"node-{i}": {"address": address} for i, address in enumerate(ADDRESSES)}
    return msgspec.convert(
        {
            "data": {"train": "t"},
            "student": {"model": "m"},
            "cluster": {"hosts": hosts},
            "actors": {
                "trainer": {
                    "hosts": list(hosts),
                    "ranks": len(hosts),
                    "collective_seconds": LIMIT_SECONDS,
                }
            },
        },
        Topology,
    )


def main(rank: int, folder: Path) -> int:
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    ear = of_ranks(topology()) if rank == 0 else None
    if ear is not None:
        with written_whole(folder / "port") as file:
            file.write(str(ear.port).encode())
    os.environ[MEETING_PORT] = (folder / "port").read_text()
    context = ActorContext(
        run_dir=folder / f"run-{rank}", runtime=folder, actor=f"trainer-{rank}" if rank else "trainer",
        role="trainer", incarnation=0, topology=topology(), run_id="over-hosts", start_version=0,
        ear=None if ear is None else ear.socket.detach(),
    )  # fmt: skip
    meeting = meet(context)
    # Each host has a run folder of its own; what the first one's is called is told.
    assert meeting.run_dir == (folder / "run-0" if rank else None)
    outcome = train(CASE, meeting.ranks)
    if rank == 0:
        save_file(outcome.tensors, folder / "outcome.safetensors")
    (folder / f"trained-{rank}").touch()
    try:
        while True:
            meeting.ranks.sum(torch.ones(1000))
    except Exception as error:
        if is_loss(error):
            return meeting.lost()
        raise


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
