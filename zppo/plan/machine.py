"""What the machine can give, and whether the processes of a plan fit on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from zppo.config.served import served_models
from zppo.config.topology import VLLM, ActorConfig, Topology, TrainerConfig
from zppo.errors import UserError
from zppo.plan.plan import Plan
from zppo.plan.processes import ProcessEntry

GIB = 1 << 30
NO_LIMIT = 1 << 62
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Lists the cards of this machine without any library."""
VLLM_SHARE = 0.92
"""What vLLM takes of a card unless it is told otherwise."""
Placed = tuple[ProcessEntry, int]
"""A process and what it needs on its card."""


class Machine(Struct, frozen=True, kw_only=True):
    """What the machine can give: cores, free bytes in memory, in the runtime folder, on the disk of
    the run directory, and of each CUDA device."""

    cores: int
    memory: int
    shared: int
    disk: int = NO_LIMIT
    gpus: list[int] = []


def measure_machine(cores: int, runtime_base: Path, run_dir: Path, wants_gpu: bool) -> Machine:
    """Ask the operating system, and torch only if a GPU is wanted (it takes seconds to import)."""
    gpus: list[int] = []
    if wants_gpu:
        import torch

        gpus = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    memory = min(psutil.virtual_memory().available, _control_group_free())
    return Machine(
        cores=cores,
        memory=memory,
        shared=shutil.disk_usage(runtime_base).free,
        disk=_disk_free(run_dir),
        gpus=gpus,
    )


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


def idle_cards(topology: Topology) -> int:
    """How many cards are here though no setting names one."""
    return 0 if wants_gpu(topology) or not NVIDIA.is_dir() else len(list(NVIDIA.iterdir()))


def check_fits(plan: Plan, machine: Machine) -> None:
    """Raise UserError for a device that is not there, and where memory is short."""
    for entry in plan.processes:
        _check_device(entry, plan.topology.actors.trainer, machine)
    if plan.host_bytes > machine.memory:
        name, size = max(
            zip(plan.processes, plan.needs, strict=True), key=lambda pair: pair[1].host
        )
        raise UserError(
            f"the plan needs {gib(plan.host_bytes)} of memory but {gib(machine.memory)} are free; "
            f"the largest part is {name.name} with {gib(size.host)}{_idle(plan.topology)}"
        )
    if plan.shared > machine.shared:
        raise UserError(
            f"the plan keeps weights of {gib(plan.shared)} in the runtime folder but "
            f"{gib(machine.shared)} are free "
            "there; lower scheduler.max_staleness or set ZPPO_RUNTIME_DIR to a larger folder"
        )
    if plan.disk.total > machine.disk:
        disk = plan.disk
        raise UserError(
            f"the run writes {gib(disk.total)} into run.directory, {disk.checkpoints} checkpoints "
            f"of {gib(disk.checkpoint)} and {gib(disk.rollouts)} of rollouts, but "
            f"{gib(machine.disk)} are free there; lower checkpoints.keep, set sinks.rollouts to "
            "false, or name a run.directory on a larger disk"
        )
    for index, free in enumerate(machine.gpus):
        _check_card(index, free, _placed(index, free, plan))


def gib(size: int) -> str:
    """A size in GiB, for people."""
    return f"{size / GIB:.1f} GiB"


def _idle(topology: Topology) -> str:
    where = "actors.trainer.device and actors.rollout.devices"
    return f"; no setting names a GPU, see {where}" if idle_cards(topology) else ""


def _check_device(entry: ProcessEntry, trainer: TrainerConfig, machine: Machine) -> None:
    kind, _, index = entry.device.partition(":")
    if not entry.device or entry.device == "cpu":
        return
    if kind != "cuda" or (index and not index.isdigit()):
        where = _setting(entry, trainer)
        raise UserError(f"{where} names {entry.device!r}; expected cpu, cuda or cuda:N")
    if int(index or 0) >= len(machine.gpus):
        raise UserError(
            f"{_setting(entry, trainer)} names {entry.device!r}; this machine has "
            f"{len(machine.gpus)} CUDA devices"
        )


def _setting(entry: ProcessEntry, trainer: TrainerConfig) -> str:
    """The setting that gives the process its device."""
    if entry.served is not None:
        return f"{entry.served.actor_path}.devices"
    return "actors.trainer.devices" if trainer.devices else "actors.trainer.device"


def _placed(index: int, free: int, plan: Plan) -> list[Placed]:
    """The processes on one card. At its start vLLM takes a share of it, unless the size of its
    cache is given."""
    names = (f"cuda:{index}", "cuda") if index == 0 else (f"cuda:{index}",)
    placed = []
    for entry, need in zip(plan.processes, plan.needs, strict=True):
        if entry.device in names:
            share = 0.0 if entry.served is None else _vllm_share(entry.served.actor)
            placed.append((entry, max(need.device, int(share * free))))
    return placed


def _vllm_share(actor: ActorConfig) -> float:
    """`free` stands for the whole card here: what others hold already is not vLLM's to take."""
    arguments: Mapping[str, Any] = actor.engine_args
    if actor.engine != VLLM or arguments.get("kv_cache_memory_bytes"):
        return 0.0
    share = arguments.get("gpu_memory_utilization", VLLM_SHARE)
    return (
        float(share)
        if isinstance(share, int | float) and not isinstance(share, bool)
        else VLLM_SHARE
    )


def _check_card(index: int, free: int, placed: Sequence[Placed]) -> None:
    needed = sum(size for _, size in placed)
    if needed > free:
        largest, size = max(placed, key=lambda pair: pair[1])
        way = "actors.trainer.gradient_checkpointing or a smaller actors.trainer.micro_batch_tokens"
        if largest.pool != "trainer":
            way = "fewer or shorter sequences, and with vLLM a smaller gpu_memory_utilization"
        raise UserError(
            f"the plan needs {gib(needed)} on cuda:{index} but {gib(free)} are free; "
            f"the largest part is {largest.name} with {gib(size)}; try {way}"
        )
