"""What machines can give, and whether the processes of a plan fit on them."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from zppo.config.cluster import LOCALHOST, HostConfig
from zppo.config.served import served_models
from zppo.config.topology import VLLM, ActorConfig, Dtype, Topology, TrainerConfig
from zppo.errors import UserError
from zppo.plan.cards import free_of_cards
from zppo.plan.engines.vllm import CACHE_BYTES, SHARE
from zppo.plan.plan import HostNeed, Plan
from zppo.plan.processes import ProcessEntry, host_name

GIB = 1 << 30
NO_LIMIT = 1 << 62
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Lists the cards of this machine without any library."""
PROCESSOR = Path("/proc/cpuinfo")
BFLOAT16 = (
    frozenset(("avx512bw", "avx512dq", "avx512vl")),
    frozenset(("avx_vnni_int8", "avx_ne_convert")),
)
"""What an x86 processor needs for oneDNN to multiply matrices of bfloat16, one of them; without,
torch does it element by element."""
SLOW_BFLOAT16 = (
    "this processor has no AVX-512 and is some 50 times slower in bfloat16 than in float32"
)
VLLM_SHARE = 0.92
"""What vLLM takes of a card unless it is told otherwise."""
Placed = tuple[ProcessEntry, int]
"""A process and what it needs on its card."""


class Machine(Struct, frozen=True, kw_only=True):
    """What the machine can give: cores, free bytes in memory, in the runtime folder, on the disk of
    the run directory, and of each CUDA device. `gpus` is None where nobody has said; `cards` counts
    those that are there, whether they were looked at or not. `dtype`: `cpu_dtype` there."""

    cores: int
    dtype: Dtype = "bfloat16"
    memory: int = NO_LIMIT
    shared: int = NO_LIMIT
    disk: int = NO_LIMIT
    gpus: list[int] | None = []
    cards: int = 0


def described(facts: HostConfig) -> Machine:
    """What a host that is not looked at has; what is not said is taken as enough."""
    memory = NO_LIMIT if facts.memory_gib is None else int(facts.memory_gib * GIB)
    cards = None if facts.cards is None else [int((facts.card_gib or 0) * GIB)] * facts.cards
    return Machine(
        cores=facts.cores or 1,
        memory=memory,
        shared=int(facts.shared_gib * GIB) if facts.shared_gib is not None else memory // 2,
        disk=NO_LIMIT if facts.disk_gib is None else int(facts.disk_gib * GIB),
        gpus=cards,
        cards=len(cards or ()),
    )


def measure_machine(cores: int, runtime_base: Path, run_dir: Path, wants_gpu: bool) -> Machine:
    """Ask the operating system, and torch only if a GPU is wanted (it takes seconds to import).
    Raises UserError for cards that torch cannot use."""
    memory = min(psutil.virtual_memory().available, _control_group_free())
    return Machine(
        cores=cores,
        dtype=cpu_dtype(),
        memory=memory,
        shared=shutil.disk_usage(runtime_base).free,
        disk=_disk_free(run_dir),
        gpus=free_of_cards() if wants_gpu else [],
        cards=len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0,
    )


def cpu_dtype(processor: Path = PROCESSOR) -> Dtype:
    """The dtype that this machine's processor is fast with: bfloat16, but float32 on an x86
    processor that has nothing for it (`BFLOAT16`), on Linux. Elsewhere nobody is asked."""
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", processor.read_text(), re.MULTILINE)
        if flags and not any(needed.issubset(flags[1].split()) for needed in BFLOAT16):
            return "float32"
    return "bfloat16"


def _disk_free(run_dir: Path) -> int:
    """Free bytes where the run directory lies or will lie, and what a run that is continued has
    there already."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    kept = (
        file.lstat().st_size
        for name in ("checkpoints", "rollouts")
        for file in (run_dir / name).rglob("*")
    )
    return shutil.disk_usage(there).free + sum(kept)


def _control_group_free() -> int:
    """Free bytes of the control group (a container's limit), or a very large number where there is
    none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (folder / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return NO_LIMIT


def wants_gpu(topology: Topology) -> bool:
    """Whether any setting names a device other than the CPU."""
    served = [device for one in served_models(topology) for device in one.actor.devices]
    return any(device != "cpu" for device in [*topology.actors.trainer.rank_devices, *served])


def idle_cards(topology: Topology, machine: Machine) -> int:
    """How many cards are here though no setting names one."""
    return 0 if wants_gpu(topology) else machine.cards


def machines_of(topology: Topology, first: Machine) -> dict[str, Machine]:
    """Each host of the plan and what it has: the `first` one was looked at, the others are as
    `cluster.hosts` says."""
    known = {name: described(facts) for name, facts in topology.cluster.hosts.items()}
    return known | {host_name(topology, LOCALHOST): first}


def check_fits(plan: Plan, machine: Machine) -> None:
    """Raise UserError for a device that is not there, and where memory is short, on the first host,
    which is `machine`, or on another one."""
    machines = machines_of(plan.topology, machine)
    for host in plan.hosts:
        _check_host(host, machines[host.name], plan)
    if plan.disk.total > machine.disk:
        disk = plan.disk
        raise UserError(
            f"the run writes {gib(disk.total)} into run.directory, {disk.checkpoints} checkpoints "
            f"of {gib(disk.checkpoint)} and {gib(disk.rollouts)} of rollouts, but "
            f"{gib(machine.disk)} are free there; lower checkpoints.keep, set sinks.rollouts to "
            "false, or name a run.directory on a larger disk"
        )


def _check_host(host: HostNeed, machine: Machine, plan: Plan) -> None:
    where = "" if host.name == LOCALHOST else f"{host.name}: "
    for entry in host.processes:
        _check_device(entry, plan.topology.actors.trainer, machine)
    if host.memory > machine.memory:
        parts = {e.name: n.host for e, n in zip(host.processes, host.needs, strict=True)}
        parts["the published weights (scheduler.max_staleness)"] = host.shared
        largest = max(parts, key=parts.__getitem__)
        raise UserError(
            f"{where}the plan needs {gib(host.memory)} of memory but {gib(machine.memory)} are "
            f"free; the largest part is {largest} with {gib(parts[largest])}"
            f"{_idle(plan.topology, machine)}"
        )
    if host.shared > machine.shared:
        raise UserError(
            f"{where}the plan keeps weights of {gib(host.shared)} in the runtime folder but "
            f"{gib(machine.shared)} are free "
            "there; lower scheduler.max_staleness or set ZPPO_RUNTIME_DIR to a larger folder"
        )
    for index, free in enumerate(machine.gpus or ()):
        _check_card(where, index, free, _placed(index, free, host))


def gib(size: int) -> str:
    """A size in GiB, for people, or in less where that would be next to nothing."""
    for unit, name in ((GIB, "GiB"), (GIB >> 10, "MiB"), (GIB >> 20, "KiB")):
        if size >= unit / 20:  # else it would be 0.0 of them
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def at_most(size: int, *, least: bool) -> str:
    """A need for people: an upper estimate, or where it is none, `at least` so much."""
    return f"{gib(size)} at {'least' if least else 'most'}"


def _idle(topology: Topology, machine: Machine) -> str:
    where = "actors.trainer.device and actors.rollout.devices"
    return f"; no setting names a GPU, see {where}" if idle_cards(topology, machine) else ""


def _check_device(entry: ProcessEntry, trainer: TrainerConfig, machine: Machine) -> None:
    if machine.gpus is None or not entry.cards:
        return
    if int(entry.cards[-1].removeprefix("cuda:")) >= len(machine.gpus):
        here = "this machine" if entry.host == LOCALHOST else f"{entry.host!r}"
        many = "" if len(entry.cards) == 1 else f", and {len(entry.cards)} cards from it on"
        unseen = ""
        if machine.cards > len(machine.gpus):
            unseen = (
                f" that torch can use, of {machine.cards} cards; expected a torch that was built "
                "for CUDA, and a CUDA_VISIBLE_DEVICES, if it is set, that names them"
            )
        raise UserError(
            f"{_setting(entry, trainer)} names {entry.device!r}{many}; {here} has "
            f"{len(machine.gpus)} CUDA devices{unseen}"
        )


def _setting(entry: ProcessEntry, trainer: TrainerConfig) -> str:
    """The setting that gives the process its device."""
    if entry.served is not None:
        return f"{entry.served.actor_path}.devices"
    return "actors.trainer.devices" if trainer.devices else "actors.trainer.device"


def _placed(index: int, free: int, host: HostNeed) -> list[Placed]:
    """The processes on one card. At its start vLLM takes a share of it, unless the size of its
    cache is given."""
    placed = []
    for entry, need in zip(host.processes, host.needs, strict=True):
        if f"cuda:{index}" in entry.cards:
            share = 0.0 if entry.served is None else _vllm_share(entry.served.actor)
            placed.append((entry, max(need.device, int(share * free))))
    return placed


def _vllm_share(actor: ActorConfig) -> float:
    """`free` stands for the whole card here: what others hold already is not vLLM's to take."""
    arguments: Mapping[str, Any] = actor.engine_args
    if actor.engine != VLLM or arguments.get(CACHE_BYTES):
        return 0.0
    return float(arguments.get(SHARE) or VLLM_SHARE)


def _check_card(where: str, index: int, free: int, placed: Sequence[Placed]) -> None:
    needed = sum(size for _, size in placed)
    if needed > free:
        largest, size = max(placed, key=lambda pair: pair[1])
        way = "actors.trainer.gradient_checkpointing or a smaller actors.trainer.micro_batch_tokens"
        if largest.pool != "trainer":
            way = "fewer or shorter sequences, and with vLLM a smaller gpu_memory_utilization"
        raise UserError(
            f"{where}the plan needs {gib(needed)} on cuda:{index} but {gib(free)} are free; "
            f"the largest part is {largest.name} with {gib(size)}; try {way}"
        )
