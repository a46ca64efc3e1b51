"""The process table of a run: which actors there are, on which devices, with how many CPU threads
each."""

from __future__ import annotations

import os

from msgspec import Struct

from zppo.algorithm.methods import Method, get_method
from zppo.config.rewards import parts_of
from zppo.config.served import ServedModel, served_student, teachers
from zppo.config.topology import JUDGE, OPENAI, TeacherConfig, Topology


class ProcessEntry(Struct, frozen=True, kw_only=True):
    """One actor process. `device` is empty where no model is run. Processes of one `pool` can do
    each other's work. `served` is the model behind a rollout or teacher actor."""

    name: str
    role: str
    pool: str
    device: str = ""
    threads: int = 1
    served: ServedModel | None = None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(topology: Topology, available_cores: int) -> list[ProcessEntry]:
    """All actor processes in the order in which they start; the controller comes first.

    Threads that the topology leaves open are shared out evenly among the processes that run a
    model; the controller, the graders and teachers behind a server take one each, which is not
    counted, because they mostly wait.
    """
    trainer, asked = topology.actors.trainer, asked_teachers(topology)
    loaded = sum(one.actor.count for one in asked if one.actor.engine != OPENAI)
    devices = trainer.rank_devices
    share = max(1, available_cores // (topology.actors.rollout.count + loaded + len(devices)))
    return [
        ProcessEntry(name="controller", role="controller", pool="controller"),
        *(
            ProcessEntry(
                name=f"trainer-{rank}" if rank else "trainer",
                role="rank" if rank else "trainer",
                pool="trainer",
                device=device,
                threads=trainer.threads or share,
            )
            for rank, device in enumerate(devices)
        ),
        *(
            process
            for one in [served_student(topology), *asked]
            for process in _engines(one, share)
        ),
        *(
            ProcessEntry(name=f"grader-{i}", role="grader", pool="grader")
            for i in range(topology.actors.grader.count)
        ),
    ]


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


def _engines(served: ServedModel, share: int) -> list[ProcessEntry]:
    """The processes of one engine; those behind a server run no model here, so they get no device
    and one thread."""
    remote = served.actor.engine == OPENAI
    return [
        ProcessEntry(
            name=f"{served.pool}-{i}",
            role=served.role,
            pool=served.pool,
            device="" if remote else served.device(i),
            threads=1 if remote else served.actor.threads or share,
            served=served,
        )
        for i in range(served.actor.count)
    ]
