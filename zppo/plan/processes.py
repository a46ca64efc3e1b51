"""The process table of a run: which actors there are, on which devices, with how many CPU threads
each."""

from __future__ import annotations

import os

from msgspec import Struct

from zppo.algorithm.methods import get_method
from zppo.config.topology import JUDGE, OPENAI, ActorConfig, ModelConfig, Topology


class ProcessPlan(Struct, frozen=True, kw_only=True):
    """One actor process. `device` is empty where no model is run. Processes of one `pool` can do
    each other's work."""

    name: str
    role: str
    pool: str
    device: str = ""
    threads: int = 1


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(topology: Topology, available_cores: int) -> list[ProcessPlan]:
    """All actor processes in the order in which they start; the controller comes first.

    Threads that the topology leaves open are shared out evenly among the processes that run a
    model; the controller, the graders and teachers behind a server take one each, which is not
    counted, because they mostly wait.
    """
    rollout, trainer = topology.actors.rollout, topology.actors.trainer
    asked = teachers(topology) if uses_teacher(topology) else []
    loaded = sum(one.actor.count for one in asked if one.actor.engine != OPENAI)
    share = max(1, available_cores // (rollout.count + loaded + 1))
    return [
        ProcessPlan(name="controller", role="controller", pool="controller"),
        ProcessPlan(
            name="trainer",
            role="trainer",
            pool="trainer",
            device=trainer.device,
            threads=trainer.threads or share,
        ),
        *_engines("rollout", "rollout", rollout, share),
        *(process for one in asked for process in _engines("teacher", one.pool, one.actor, share)),
        *(
            ProcessPlan(name=f"grader-{i}", role="grader", pool="grader")
            for i in range(topology.actors.grader.count)
        ),
    ]


class TeacherPlan(Struct, frozen=True, kw_only=True):
    """One teacher of a run, where it is set, and the name of the pool that its processes form."""

    pool: str
    model: ModelConfig
    actor: ActorConfig
    model_where: str
    where: str


def teachers(topology: Topology) -> list[TeacherPlan]:
    """All teachers in the order in which they are asked; none without a section `teacher`."""
    if topology.teacher is None:
        return []
    first = TeacherPlan(
        pool=teacher_pool(0),
        model=topology.teacher,
        actor=topology.actors.teacher,
        model_where="teacher.model",
        where="actors.teacher",
    )
    others = [
        TeacherPlan(
            pool=teacher_pool(i),
            model=one,
            actor=one.actor,
            model_where=f"more_teachers[{i - 1}].model",
            where=f"more_teachers[{i - 1}].actor",
        )
        for i, one in enumerate(topology.more_teachers, start=1)
    ]
    return [first, *others]


def teacher_pool(index: int) -> str:
    """Pool of the index-th teacher: `teacher`, `teacher2`, `teacher3`, …; its processes are
    `teacher2-0` and so on."""
    return f"teacher{index + 1}" if index else "teacher"


def uses_teacher(topology: Topology) -> bool:
    """Whether the run starts teacher processes: there is a teacher, and the method or the grader
    has work for it."""
    if topology.teacher is None:
        return False
    method = get_method(topology.method.name)
    scores = method.needs_scores and topology.teacher.scoring == "remote"
    return method.asks_teacher or scores or topology.data.grader == JUDGE


def trainer_scores(topology: Topology) -> bool:
    """Whether the trainer holds a copy of the teacher, for distillation over the whole
    vocabulary."""
    method = get_method(topology.method.name)
    return (
        method.needs_scores
        and topology.teacher is not None
        and topology.teacher.scoring == "colocated"
    )


def _engines(role: str, pool: str, config: ActorConfig, share: int) -> list[ProcessPlan]:
    """The processes of one engine; those behind a server run no model here, so they get no device
    and one thread."""
    served = config.engine == OPENAI
    threads, devices = 1 if served else config.threads or share, [""] if served else config.devices
    return [
        ProcessPlan(
            name=f"{pool}-{i}",
            role=role,
            pool=pool,
            device=devices[i % len(devices)],
            threads=threads,
        )
        for i in range(config.count)
    ]
