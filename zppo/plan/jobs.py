"""A run of several hosts as a job of a scheduler: a script for SLURM, a JobSet for Kubernetes.

Both run `zppo launch` on the first host and `zppo join` on each of the others, over a file system
that all of them share. Nothing of a topology is read by a shell: a manifest holds lists of
arguments, and in a script every word of the user's stands in single quotes (`shlex.quote`); what a
scheduler itself reads from a line is made of letters, digits and dashes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from zppo.config.cluster import HostConfig
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.placement import cards_of, used_hosts

LONGEST_NAME = 40
"""Characters of a job's name: with a host's behind it, still the name of a pod."""
SHARED_MEMORY = "/dev/shm"


class Job(Struct, frozen=True, kw_only=True):
    """What is run: the topology's file, settings from the command line, and the run directory and
    the folder of key files, all of them absolute and on the shared file system."""

    topology: Topology
    file: Path
    settings: list[str]
    run_directory: Path
    key_folder: Path

    @property
    def hosts(self) -> list[str]:
        """The hosts that run a process, the controller's first."""
        return used_hosts(self.topology)

    @property
    def name(self) -> str:
        """The run's name, in letters, digits and dashes."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.topology.run.name.lower()).strip("-")
        return f"zppo-{plain}"[:LONGEST_NAME].rstrip("-")

    def launch(self) -> list[str]:
        """The command of the first host, without the addresses of the hosts."""
        fixed = [f"run.directory={self.run_directory}", "cluster.launcher=local"]
        sets = [part for text in [*self.settings, *fixed] for part in ("--set", text)]
        return ["zppo", "launch", str(self.file), "--keys", str(self.key_folder), *sets]

    def join(self, host: str) -> list[str]:
        """The command of a further host."""
        return ["zppo", "join", "--key", str(self.key_folder / f"{host}.key")]

    def facts(self, host: str) -> HostConfig:
        return self.topology.cluster.hosts.get(host, HostConfig())

    def cards(self, host: str) -> int:
        return cards_of(self.topology, host)


# ---- SLURM ---------------------------------------------------------------------------------------

SBATCH = """\
#!/bin/bash
{directives}
# One task a node: zppo launch on the first, zppo join on each of the others.
set -euo pipefail

hosts=({hosts})
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=({launch})
for i in "${{!hosts[@]}}"; do
  launch+=(--set "cluster.hosts.${{hosts[i]}}.address=${{nodes[i]}}")
done
"""
JOINS = """\
join=({join})
srun --nodes={further} --ntasks={further} --ntasks-per-node=1 --relative=1 \\
  bash -c 'key=$((SLURM_PROCID + 1)); exec zppo join --key "${{!key}}"' zppo "${{join[@]}}" &
"""
LAUNCH = """\
srun --nodes=1 --ntasks=1 --relative=0 "${launch[@]}"
wait
"""


def batch_script(job: Job) -> str:
    """A script for `sbatch`. The nodes of an allocation get the names of the topology's hosts in
    order. Raises UserError if the hosts are not alike, which an allocation of one kind needs."""
    hosts = job.hosts
    directives = [
        f"--job-name={job.name}",
        f"--nodes={len(hosts)}",
        "--ntasks-per-node=1",
        "--exclusive",
    ]
    if cards := _common("cards", [job.cards(host) for host in hosts]):
        directives.append(f"--gpus-per-node={cards}")
    parts = SBATCH.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        hosts=shlex.join(hosts),
        launch=shlex.join(job.launch()),
    )
    if len(hosts) > 1:
        keys = shlex.join([job.join(host)[-1] for host in hosts[1:]])
        parts += JOINS.format(join=keys, further=len(hosts) - 1)
    return parts + LAUNCH


def _common(what: str, values: Sequence[int]) -> int:
    if len(set(values)) > 1:
        raise UserError(
            f"cluster.hosts: {what} are {', '.join(map(str, values))}; expected the same on every "
            "host, because the nodes of one SLURM job are alike"
        )
    return values[0]


# ---- Kubernetes ----------------------------------------------------------------------------------


def job_set(job: Job, image: str, claim: str, mount: str) -> str:
    """A manifest for `kubectl apply`, of Kubernetes' JobSet: one pod for each host, which runs
    `image` and has the volume of the claim at `mount`."""
    first = job.hosts[0]
    address = {host: f"{job.name}-{_plain(host)}-0-0.{job.name}" for host in job.hosts}
    known = [f"cluster.hosts.{host}.address={address[host]}" for host in job.hosts]
    launch = [*job.launch(), *(part for text in known for part in ("--set", text))]
    if len({_plain(host) for host in job.hosts}) < len(job.hosts):
        raise UserError(
            "cluster.hosts: two names differ in capitals or underscores only; expected names that "
            "differ as names of pods"
        )
    pods = [
        _pod(job, host, launch if host == first else job.join(host), image, claim, mount)
        for host in job.hosts
    ]
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "successPolicy": {
                "operator": "All",
                "targetReplicatedJobs": [_plain(first)],
            },
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": pods,
        },
    }
    text: str = yaml.safe_dump(manifest, sort_keys=False, width=10_000)
    return text


def _pod(
    job: Job, host: str, command: list[str], image: str, claim: str, mount: str
) -> dict[str, Any]:
    facts, limits = job.facts(host), dict[str, Any]()
    if cards := job.cards(host):
        limits["nvidia.com/gpu"] = cards
    if facts.cores is not None:
        limits["cpu"] = facts.cores
    if facts.memory_gib is not None:
        limits["memory"] = f"{math.floor(facts.memory_gib)}Gi"
    memory: dict[str, Any] = {"medium": "Memory"}
    if facts.shared_gib is not None:
        memory["sizeLimit"] = f"{math.floor(facts.shared_gib)}Gi"
    container = {
        "name": "zppo",
        "image": image,
        "command": command,
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "shared", "mountPath": mount},
            {"name": "memory", "mountPath": SHARED_MEMORY},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "memory", "emptyDir": memory},
        ],
    }
    job_spec = {"backoffLimit": 0, "template": {"spec": pod}}
    return {"name": _plain(host), "replicas": 1, "template": {"spec": job_spec}}


def _plain(host: str) -> str:
    """The name of a host as that of a pod: lower case, no underscores."""
    return host.lower().replace("_", "-").strip("-")
