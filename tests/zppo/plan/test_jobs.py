"""Jobs of schedulers: what a shell and Kubernetes make of them, whatever a topology says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zppo.cli import main as zppo
from zppo.config.load import convert
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.jobs import Job, batch_script, job_set

HOSTILE = "it's $(touch owned) `touch owned` \"; touch owned #\\"
STUB = """#!{python}
import json, os, sys
with open(os.environ["SAID"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
SCONTROL = "#!/bin/sh\necho 'c1'; echo 'c2'; echo 'c3'\n"
SRUN = """#!{python}
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[1:]
count = next(int(word.partition("=")[2]) for word in options if word.startswith("--ntasks="))
for task in range(count):
    subprocess.run(command, env=os.environ | {{"SLURM_PROCID": str(task)}}, check=True)
"""


def topology_of(name: str = "paper", **hosts: dict[str, object]) -> Topology:
    facts = hosts or {"n-0": {"cards": 8, "card_gib": 80}, "n_1": {"cards": 8, "card_gib": 80}}
    names = list(facts)
    return convert(
        {
            "run": {"name": name},
            "data": {"train": "q"},
            "student": {"model": "s"},
            "actors": {"rollout": {"count": len(names), "hosts": names}},
            "cluster": {"launcher": "render", "hosts": facts},
        },
        {"": "t.yaml"},
    )


def job_of(topology: Topology, folder: str = "/shared") -> Job:
    shared = Path(folder)
    return Job(
        topology=topology,
        file=shared / "paper.yaml",
        settings=[],
        run_directory=shared / "runs" / "paper",
        key_folder=shared / "runs" / "paper.keys",
    )


def run_script(script: str, tmp_path: Path) -> list[list[str]]:
    """What the commands in a batch script were told, run by bash; the scheduler is played."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("zppo", STUB), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    path = tmp_path / "job.sh"
    path.write_text(script)
    said = tmp_path / "said"
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "c[1-3]",
        "SAID": str(said),
    }
    work = tmp_path / "work"
    work.mkdir()
    # The joins are in the background, as they are in the job; bash waits for none of them.
    subprocess.run(
        ["bash", "-c", 'source "$1"; wait', "job", str(path)], cwd=work, env=env, check=True
    )
    assert list(work.iterdir()) == []
    return sorted(json.loads(line) for line in said.read_text().splitlines())


def test_a_batch_script_launches_on_the_first_node_and_joins_on_the_others(tmp_path: Path) -> None:
    topology = topology_of(**{name: {} for name in ("n-0", "n-1", "n-2")})
    script = batch_script(job_of(topology))
    assert script.splitlines()[:6] == [
        "#!/bin/bash",
        "#SBATCH --job-name=zppo-paper",
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --exclusive",
        "# One task a node: zppo launch on the first, zppo join on each of the others.",
    ]
    addresses = [("n-0", "c1"), ("n-1", "c2"), ("n-2", "c3")]
    assert run_script(script, tmp_path) == [
        ["zppo", "join", "--key", "/shared/runs/paper.keys/n-1.key"],
        ["zppo", "join", "--key", "/shared/runs/paper.keys/n-2.key"],
        [
            *("zppo", "launch", "/shared/paper.yaml", "--keys", "/shared/runs/paper.keys"),
            *("--set", "run.directory=/shared/runs/paper", "--set", "cluster.launcher=local"),
            *(
                word
                for name, address in addresses
                for word in ("--set", f"cluster.hosts.{name}.address={address}")
            ),
        ],
    ]


def test_nothing_of_a_topology_is_read_by_the_shell(tmp_path: Path) -> None:
    topology = topology_of(f"{HOSTILE}\n#SBATCH --uid=0", **{"n-0": {}, "n-1": {}})
    said = run_script(batch_script(job_of(topology, f"/{HOSTILE}")), tmp_path)
    assert [line[:2] for line in said] == [["zppo", "join"], ["zppo", "launch"]]
    assert said[0][3] == f"/{HOSTILE}/runs/paper.keys/n-1.key"
    assert said[1][2] == f"/{HOSTILE}/paper.yaml"


def test_the_name_of_a_run_cannot_give_orders_to_the_scheduler() -> None:
    script = batch_script(job_of(topology_of("A run\n#SBATCH --uid=0\n")))
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives[0] == "#SBATCH --job-name=zppo-a-run-sbatch-uid-0"
    assert "#SBATCH --gpus-per-node=8" in directives and len(directives) == 5


def test_nodes_of_one_job_are_alike() -> None:
    topology = topology_of(**{"a": {"cards": 8, "card_gib": 80}, "b": {"cards": 4, "card_gib": 80}})
    with pytest.raises(UserError) as caught:
        batch_script(job_of(topology))
    assert str(caught.value) == (
        "cluster.hosts: cards are 8, 4; expected the same on every host, because the nodes of one "
        "SLURM job are alike"
    )


def test_a_job_set_has_a_pod_for_each_host() -> None:
    facts = {"cards": 8, "card_gib": 80, "memory_gib": 900.5, "shared_gib": 400, "cores": 96}
    topology = topology_of(HOSTILE, **{"n-0": facts, "N_1": {}})
    found = yaml.safe_load(job_set(job_of(topology, f"/{HOSTILE}"), "zppo:1", "claim", "/shared"))
    first, second = found["spec"]["replicatedJobs"]
    assert (first["name"], second["name"]) == ("n-0", "n-1")
    pod = second["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command == ["zppo", "join", "--key", f"/{HOSTILE}/runs/paper.keys/N_1.key"]
    container = first["template"]["spec"]["template"]["spec"]["containers"][0]
    name = found["metadata"]["name"]
    assert container["command"][-4:] == [
        *("--set", f"cluster.hosts.n-0.address={name}-n-0-0-0.{name}"),
        *("--set", f"cluster.hosts.N_1.address={name}-n-1-0-0.{name}"),
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 96, "memory": "900Gi"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "data: {train: q}\nstudent: {model: s}\ncluster: {hosts: {a: {}, b: {}}}\n"
        "actors: {rollout: {count: 2, hosts: [a, b]}}\n"
    )
    assert zppo(["render", str(file), "--as", "slurm"]) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert zppo(["render", str(file), "--as", "pbs"]) == 2
    assert capsys.readouterr().err == ("zppo render: --as is 'pbs'; expected slurm or kubernetes\n")
    assert zppo(["render", str(file), "--as", "kubernetes", "--image", "i"]) == 2
    assert capsys.readouterr().err == (
        "zppo render: --claim is missing; --as kubernetes needs the image, the claim of the shared "
        "volume and where to mount it\n"
    )
