"""Engines by name. A name leads to a module that is imported only when it is built: one engine's
packages suffice."""

from __future__ import annotations

import importlib

from zppo.errors import UserError, nearest
from zppo_actors.engines.base import Engine, EngineError, EngineSpec

ENGINES: dict[str, str] = {
    "transformers": "zppo_actors.engines.transformers.engine",
    "simulated": "zppo_actors.engines.simulated",
    "vllm": "zppo_actors.engines.vllm.engine",
    "openai": "zppo_actors.engines.openai.engine",
}
"""Name -> module with `create(spec) -> Engine`."""

__all__ = ["ENGINES", "Engine", "EngineError", "EngineSpec", "create", "module_of"]


def module_of(name: str, where: str) -> str:
    """The module of engine `name`. Raises UserError with the nearest name; `where` is the path of
    the section."""
    if name not in ENGINES:
        raise UserError(f"{where}.engine: no engine is called {name!r}{nearest(name, ENGINES)}")
    return ENGINES[name]


def create(spec: EngineSpec) -> Engine:
    """Build the engine that the settings name. Raises UserError for an unknown name, unknown
    arguments, or a model it cannot serve."""
    module = module_of(spec.served.actor.engine, spec.served.actor_path)
    engine: Engine = importlib.import_module(module).create(spec)
    return engine
