"""`zppo render`: a run of several hosts as a job for SLURM or Kubernetes.

It starts nothing: what it writes runs `zppo launch` on the first host and `zppo join` on the
others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from zppo.algorithm.methods import get_method
from zppo.config.load import load, run_folder
from zppo.config.typed import setting_typed
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, run_command
from zppo.plan.jobs import Job, batch_script, job_set
from zppo.plan.placement import check_placement

SLURM, KUBERNETES = "slurm", "kubernetes"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the job to standard output. Returns 0, or 2 after a user error."""
    try:
        print(_rendered(_parser().parse_args(argv)), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _rendered(asked: argparse.Namespace) -> str:
    topology = load(asked.file, [*asked.set, "cluster.launcher=render"])
    check_placement(topology, get_method(topology.method.name))
    directory = run_folder(topology)
    job = Job(
        topology=topology,
        file=asked.file.absolute(),
        settings=asked.set,
        run_directory=directory,
        key_folder=directory.with_name(f"{directory.name}.keys"),
    )
    if asked.as_ == SLURM:
        return batch_script(job)
    if asked.as_ != KUBERNETES:
        raise UserError(f"zppo render: --as is {asked.as_!r}; expected {SLURM} or {KUBERNETES}")
    for option in ("image", "claim", "mount"):
        if getattr(asked, option) is None:
            raise UserError(
                f"zppo render: --{option} is missing; --as {KUBERNETES} needs the image, the claim "
                "of the shared volume and where to mount it"
            )
    return job_set(job, asked.image, asked.claim, asked.mount)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo render",
        description="Write a run of several hosts as a job of a scheduler.",
        settings=setting_typed,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the run, in YAML")
    parser.add_argument("--as", dest="as_", required=True, metavar=f"{SLURM}|{KUBERNETES}")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--image", help="kubernetes: the container image, with zppo in it")
    parser.add_argument("--claim", help="kubernetes: the claim of the volume that all pods share")
    parser.add_argument("--mount", help="kubernetes: where that volume is mounted")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
