"""The models that a run serves: the student and its teachers, each with the actors that serve it
and the names of the settings that say so.

Plan, actors and engines speak of a served model as this one value; no other place knows that the
first teacher is set in `teacher` and `actors.teacher` and the second in `more_teachers[0]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from zppo.config.topology import ActorConfig, ModelConfig, Topology


class ServedModel(Struct, frozen=True, kw_only=True):
    """A model and its actors.

    `model_path` and `actor_path` are what messages call the two: settings such as `teacher.model`
    and `actors.teacher`, or the option of a command that names both. `index` counts the teachers in
    the order in which they are asked.
    """

    role: Literal["rollout", "teacher"]
    """The role of the processes that serve it: the student rolls out."""
    index: int = 0
    model: ModelConfig
    actor: ActorConfig
    model_path: str
    actor_path: str

    @property
    def pool(self) -> str:
        """Name of its processes' pool; they can do each other's work, and are called `rollout-0`
        and so on."""
        return self.role if self.role == "rollout" else teacher_pool(self.index)

    @property
    def section(self) -> str:
        """The settings of the model: `teacher`, `more_teachers[0]`."""
        return self.model_path.removesuffix(".model")

    @property
    def folder(self) -> Path:
        """The model's folder; behind a server the model has only a name."""
        return Path(self.model.model)

    def device(self, number: int) -> str:
        """The device of process `number` of its pool; each host gives out its own in turn."""
        return self.actor.devices[number % self._on_each_host % len(self.actor.devices)]

    def host(self, number: int) -> str:
        """The host of process `number` of its pool, as the settings name it: hosts have equal
        blocks."""
        hosts = self.actor.hosts
        return hosts[min(number // self._on_each_host, len(hosts) - 1)]

    @property
    def _on_each_host(self) -> int:
        return max(1, self.actor.count // len(self.actor.hosts))


def served_student(topology: Topology) -> ServedModel:
    """The student, as the rollout actors serve it."""
    return ServedModel(
        role="rollout",
        model=topology.student,
        actor=topology.actors.rollout,
        model_path="student.model",
        actor_path="actors.rollout",
    )


def teachers(topology: Topology) -> list[ServedModel]:
    """All teachers in the order in which they are asked; none without a section `teacher`."""
    if topology.teacher is None:
        return []
    first = ServedModel(
        role="teacher",
        model=topology.teacher,
        actor=topology.actors.teacher,
        model_path="teacher.model",
        actor_path="actors.teacher",
    )
    others = [
        ServedModel(
            role="teacher",
            index=i + 1,
            model=one,
            actor=one.actor,
            model_path=f"more_teachers[{i}].model",
            actor_path=f"more_teachers[{i}].actor",
        )
        for i, one in enumerate(topology.more_teachers)
    ]
    return [first, *others]


def served_models(topology: Topology) -> list[ServedModel]:
    """The student and all teachers."""
    return [served_student(topology), *teachers(topology)]


def teacher_pool(index: int) -> str:
    """Pool of the index-th teacher: `teacher`, `teacher2`, `teacher3`, …"""
    return f"teacher{index + 1}" if index else "teacher"
