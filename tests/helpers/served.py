"""Served models without a topology around them: a student and a teacher as their settings would
name them."""

from __future__ import annotations

from typing import Any

from zppo.config.served import ServedModel
from zppo.config.topology import ActorConfig, ModelConfig


def student_of(model: Any, /, *, engine: str = "transformers", **engine_args: Any) -> ServedModel:
    """The student in the folder `model`, in float32."""
    return ServedModel(
        role="rollout",
        model=ModelConfig(model=str(model), dtype="float32"),
        actor=ActorConfig(engine=engine, engine_args=engine_args),
        model_path="student.model",
        actor_path="actors.rollout",
    )


def teacher_of(model: Any, /, *, engine: str = "transformers", **engine_args: Any) -> ServedModel:
    """The first teacher, in the folder or under the name `model`."""
    return ServedModel(
        role="teacher",
        model=ModelConfig(model=str(model)),
        actor=ActorConfig(engine=engine, engine_args=engine_args),
        model_path="teacher.model",
        actor_path="actors.teacher",
    )
