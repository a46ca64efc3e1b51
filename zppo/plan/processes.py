"""The process table of a run: which actors there are, on which hosts and devices, with how many CPU
threads each. What cannot be laid out is refused in `zppo.plan.placement`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from zppo.algorithm.methods import Method, get_method
from zppo.config.cluster import LOCALHOST
from zppo.config.rewards import parts_of
from zppo.config.served import ServedModel, served_student, teachers
from zppo.config.topology import (
    JUDGE,
    OPENAI,
    VLLM,
    GraderConfig,
    TeacherConfig,
    Topology,
    TrainerConfig,
)

WEIGHTS = "weights"
"""Role of the processes that carry published weights from host to host; the first serves."""
SPREAD = "tensor_parallel_size"
"""Argument of vLLM: how many cards one engine is spread over."""
SHARED = 0
"""Threads of an entry that gets a share of its host's cores."""


class ProcessEntry(Struct, frozen=True, kw_only=True):
    """One actor process on a host of the cluster (`localhost` where none is named). `device` is
    empty where no model is run. Processes of one `pool` can do each other's work. `served` is the
    model behind a rollout or teacher actor."""

    name: str
    role: str
    pool: str
    host: str = LOCALHOST
    device: str = ""
    threads: int = 1
    served: ServedModel | None = None

    @property
    def cards(self) -> list[str]:
        """The cards of its host that it uses, as `cuda:N`: those from its device on that an engine
        is spread over."""
        kind, _, index = self.device.partition(":")
        if kind != "cuda":
            return []
        count = 1 if self.served is None else _spread(self.served)
        return [f"cuda:{int(index or 0) + i}" for i in range(count)]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_name(topology: Topology, host: str) -> str:
    """The name that a host has in `cluster.hosts`; `localhost` is the first one, if there is
    any."""
    return next(iter(topology.cluster.hosts), LOCALHOST) if host == LOCALHOST else host


def processes(topology: Topology, available_cores: int) -> list[ProcessEntry]:
    """All actor processes in the order in which they start; the controller comes first.

    Threads that the topology leaves open are shared out evenly among the processes of a host that
    run a model; the controller, the graders and teachers behind a server take one each, which is
    not counted, because they mostly wait. A host has `available_cores` unless `cluster.hosts` says
    how many.
    """
    table = [
        ProcessEntry(name="controller", role="controller", pool="controller"),
        *_ranks(topology.actors.trainer),
        *(
            process
            for one in [served_student(topology), *asked_teachers(topology)]
            for process in _engines(one)
        ),
        *_graders(topology.actors.grader),
    ]
    table = [replace(entry, host=host_name(topology, entry.host)) for entry in table]
    table += _weights(table)
    return _with_threads(table, topology, available_cores)


def carriers(table: Sequence[ProcessEntry]) -> dict[str, str]:
    """Engine of the student -> the process that brings weights to its host, where that is not the
    trainer's."""
    away = [entry for entry in table if entry.role == WEIGHTS][1:]
    bringing = {entry.host: entry.name for entry in away}
    return {
        entry.name: bringing[entry.host]
        for entry in table
        if entry.role == "rollout" and entry.host in bringing
    }


def asked_teachers(topology: Topology) -> list[ServedModel]:
    """The teachers that the run starts processes for."""
    return teachers(topology) if uses_teacher(topology) else []


def uses_teacher(topology: Topology) -> bool:
    """Whether the run starts teacher processes: there is a teacher, and the method or the grader
    has work for it."""
    if topology.teacher is None:
        return False
    method = get_method(topology.method.name)
    scores = method.needs_scores and topology.teacher.scoring == "remote"
    grades = teacher_grades(topology)
    return method.asks_teacher or scores or grades


def teacher_grades(topology: Topology) -> bool:
    """Whether the teacher grades responses, alone or with a part of the reward."""
    return topology.data.grader == JUDGE or any(
        part.of_teacher for part in parts_of(topology.data.reward)
    )


def trainer_scores(method: Method, teacher: TeacherConfig | None) -> bool:
    """Whether the trainer holds a copy of the teacher, for distillation over the whole
    vocabulary."""
    return method.needs_scores and teacher is not None and teacher.scoring == "colocated"


def _ranks(trainer: TrainerConfig) -> list[ProcessEntry]:
    return [
        ProcessEntry(
            name=f"trainer-{rank}" if rank else "trainer",
            role="rank" if rank else "trainer",
            pool="trainer",
            host=host,
            device=device,
            threads=trainer.threads or SHARED,
        )
        for rank, (host, device) in enumerate(
            zip(trainer.rank_hosts, trainer.rank_devices, strict=True)
        )
    ]


def _engines(served: ServedModel) -> list[ProcessEntry]:
    """The processes of one engine; those behind a server run no model here, so they get no device
    and one thread."""
    remote = served.actor.engine == OPENAI
    return [
        ProcessEntry(
            name=f"{served.pool}-{i}",
            role=served.role,
            pool=served.pool,
            host=served.host(i),
            device="" if remote else served.device(i),
            threads=1 if remote else served.actor.threads or SHARED,
            served=served,
        )
        for i in range(served.actor.count)
    ]


def _graders(grader: GraderConfig) -> list[ProcessEntry]:
    each = max(1, grader.count // len(grader.hosts))
    return [
        ProcessEntry(
            name=f"grader-{i}",
            role="grader",
            pool="grader",
            host=grader.hosts[min(i // each, len(grader.hosts) - 1)],
        )
        for i in range(grader.count)
    ]


def _weights(table: list[ProcessEntry]) -> list[ProcessEntry]:
    """One process that serves the published weights, and one for each further host whose engines
    need them; none where they all are on the trainer's host."""
    home = next(entry.host for entry in table if entry.role == "trainer")
    loading = dict.fromkeys(entry.host for entry in table if entry.role == "rollout")
    away = [host for host in loading if host != home]
    return [
        ProcessEntry(name=f"{WEIGHTS}-{i}", role=WEIGHTS, pool=WEIGHTS, host=host)
        for i, host in enumerate([home, *away] if away else [])
    ]


def _with_threads(
    table: list[ProcessEntry], topology: Topology, available_cores: int
) -> list[ProcessEntry]:
    """The same table with the cores of each host shared out among the processes that run a
    model."""
    sharing = Counter(entry.host for entry in table if entry.device)
    hosts = topology.cluster.hosts
    shares = {
        host: max(1, ((host in hosts and hosts[host].cores) or available_cores) // count)
        for host, count in sharing.items()
    }
    return [
        replace(entry, threads=shares[entry.host]) if entry.threads == SHARED else entry
        for entry in table
    ]


def _spread(served: ServedModel) -> int:
    """How many cards an engine is spread over; `zppo.plan.placement` refuses what is no count."""
    size = served.actor.engine_args.get(SPREAD, 1)
    return size if served.actor.engine == VLLM and isinstance(size, int) else 1
