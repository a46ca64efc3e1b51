"""Building and running the transformers engine for a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from served import student_of

from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.base import Engine
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples


def build(folder: Path, **engine_args: Any) -> Any:
    return create(EngineSpec(served=student_of(folder, **engine_args)))


def run(engine: Engine, work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work`, then close the engine."""

    async def bounded() -> Any:
        try:
            return await asyncio.wait_for(work, 600.0)
        finally:
            await engine.close()

    return asyncio.run(bounded())


async def sample(engine: Engine, *tasks: GenerateTask) -> list[GroupSamples]:
    return await asyncio.gather(*(engine.generate(task) for task in tasks))
