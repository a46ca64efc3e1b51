"""The process table of a run: which actors there are, on which devices, with how many CPU threads each."""

from __future__ import annotations

import os

from msgspec import Struct

from zppo.config import ActorConfig, Topology
from zppo.grading import JUDGE
from zppo.methods import get_method
from zppo.openai_arguments import OPENAI


class ProcessPlan(Struct, frozen=True, kw_only=True):
    """One actor process. `device` is empty where no model is run."""

    name: str
    role: str
    device: str = ""
    threads: int = 1


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(topology: Topology, available_cores: int) -> list[ProcessPlan]:
    """All actor processes in the order in which they start; the controller comes first.

    Threads that the topology leaves open are shared out evenly among the processes that run a model; the controller,
    the graders and teachers behind a server take one each, which is not counted, because they mostly wait.
    """
    rollout, teacher, trainer = topology.actors.rollout, topology.actors.teacher, topology.actors.trainer
    teachers = teacher.count if uses_teacher(topology) else 0
    served = teacher.engine == OPENAI
    share = max(1, available_cores // (rollout.count + (0 if served else teachers) + 1))
    return [
        ProcessPlan(name="controller", role="controller"),
        ProcessPlan(name="trainer", role="trainer", device=trainer.device, threads=trainer.threads or share),
        *_engines("rollout", rollout, rollout.count, share),
        *(_served_teachers(teachers) if served else _engines("teacher", teacher, teachers, share)),
        *(ProcessPlan(name=f"grader-{i}", role="grader") for i in range(topology.actors.grader.count)),
    ]


def uses_teacher(topology: Topology) -> bool:
    """Whether the run starts teacher processes: there is a teacher, and the method or the grader has work for it."""
    judges = topology.data.grader == JUDGE
    return topology.teacher is not None and (judges or get_method(topology.method.name).uses_teacher)


def _engines(role: str, config: ActorConfig, count: int, share: int) -> list[ProcessPlan]:
    threads = config.threads or share
    devices = config.devices
    return [
        ProcessPlan(name=f"{role}-{i}", role=role, device=devices[i % len(devices)], threads=threads)
        for i in range(count)
    ]


def _served_teachers(count: int) -> list[ProcessPlan]:
    return [ProcessPlan(name=f"teacher-{i}", role="teacher") for i in range(count)]
