"""Engines by name. A name leads to a module that is imported only when it is built: one engine's
packages suffice. Any other name is an engine of the user's own (`zppo.extensions`)."""

from __future__ import annotations

import importlib
from typing import Any

from zppo import extensions
from zppo.errors import UserError
from zppo_actors.engines.base import Engine, EngineError, EngineSpec

ENGINES: dict[str, str] = {
    "transformers": "zppo_actors.engines.transformers.engine",
    "simulated": "zppo_actors.engines.simulated",
    "vllm": "zppo_actors.engines.vllm.engine",
    "openai": "zppo_actors.engines.openai.engine",
}
"""Name -> module with `create(spec) -> Engine`."""

EVERY = ("capacity", "policy_version", "progress", "broken", "generate", "close")
"""What every engine has; `load_policy` and `score` are for those that are asked for them."""

__all__ = ["ENGINES", "Engine", "EngineError", "EngineSpec", "create"]


def create(spec: EngineSpec) -> Engine:
    """Build the engine that the settings name. Raises UserError for an unknown name, unknown
    arguments, or a model it cannot serve."""
    name, setting = spec.served.actor.engine, f"{spec.served.actor_path}.engine"
    if name in ENGINES:
        engine: Engine = importlib.import_module(ENGINES[name]).create(spec)
    else:
        made_by = extensions.load(setting, name, "engine", ENGINES).value
        engine = _checked(setting, name, made_by(spec))
    return engine


def _checked(setting: str, name: str, engine: Any) -> Engine:
    missing = next((one for one in EVERY if not hasattr(engine, one)), None)
    if missing is not None:
        raise UserError(
            f"{setting}: {name!r} built an object of type {type(engine).__name__} without "
            f"{missing!r}; expected an engine (zppo_actors/engines/base.py)"
        )
    found: Engine = engine
    return found
