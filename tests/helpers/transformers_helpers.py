"""Building and running the transformers engine for a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from zppo.config.topology import ModelConfig
from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.base import Engine
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples


def build(folder: Path, **engine_args: Any) -> Any:
    spec = EngineSpec(
        model=ModelConfig(model=str(folder), dtype="float32"),
        where="actors.rollout",
        model_where="student.model",
        engine_args=engine_args,
    )
    return create("transformers", spec)


def run(engine: Engine, work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work`, then close the engine."""

    async def bounded() -> Any:
        try:
            return await asyncio.wait_for(work, 120.0)
        finally:
            await engine.close()

    return asyncio.run(bounded())


async def sample(engine: Engine, *tasks: GenerateTask) -> list[GroupSamples]:
    return await asyncio.gather(*(engine.generate(task) for task in tasks))
