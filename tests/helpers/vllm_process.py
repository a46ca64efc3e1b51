"""Engines of vLLM in a process of their own, which may have a torchvision on its path that this one
must not find (`tools/get_torchvision.py`)."""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zppo.signals import die_with_parent

SECONDS = 1800.0
APART = Path(sys.prefix) / "torchvision"


def reason_to_skip() -> str:
    """Why vLLM's code of Qwen3.5 cannot be had here; empty if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if importlib.util.find_spec("torchvision") is None and not APART.is_dir():
        return "there is no torchvision: make test gets one, or says why not"
    return ""


class EngineProcess:
    """Engines by name, and the loop they live in, in another process. `close` ends it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        apart = [] if importlib.util.find_spec("torchvision") else [str(APART)]
        self._process = context.Process(target=_serve, args=(other, apart))
        self._process.start()
        other.close()

    def run(self, work: Callable[..., Any], name: str, *arguments: Any) -> Any:
        """Await `work`, a function of a module, with the engine of this name."""
        self._connection.send((work, name, arguments))
        assert self._connection.poll(SECONDS), "the engine's process does not answer"
        fine, answer = self._connection.recv()
        if not fine:
            raise RuntimeError(answer)
        return answer

    def start(self, name: str, spec: Any) -> None:
        """Build an engine. Raises RuntimeError with the stack of what goes wrong."""
        self.run(_create, name, spec)

    def close(self) -> None:
        """End all engines and the process."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(60.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


ENGINES: dict[str, Any] = {}


def _serve(connection: Connection, apart: Sequence[str]) -> None:
    die_with_parent(signal.SIGKILL)
    # Before transformers is imported, which looks for torchvision once.
    sys.path[:0] = apart
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with asyncio.Runner() as runner:
        while (request := connection.recv()) is not None:
            work, name, arguments = request
            engine = ENGINES.get(name, name)
            try:
                found = runner.run(asyncio.wait_for(work(engine, *arguments), SECONDS))
                connection.send((True, found))
            except Exception:
                connection.send((False, traceback.format_exc()))
        for engine in ENGINES.values():
            runner.run(engine.close())


async def _create(name: str, spec: Any) -> None:
    from zppo_actors.engines import create

    ENGINES[name] = create(spec)


async def generate(engine: Any, *tasks: Any) -> list[Any]:
    return await asyncio.gather(*(engine.generate(task) for task in tasks))


async def score(engine: Any, task: Any) -> Any:
    return await engine.score(task)


async def load(engine: Any, manifest: Any) -> int:
    await engine.load_policy(manifest)
    version: int = engine.policy_version
    return version


async def load_in_flight(engine: Any, task: Any, manifest: Any, policy: str, tokens: int) -> Any:
    """Samples of a task during which a policy was loaded, when so many `tokens` were sampled."""
    before, engine._kv_policy = engine._kv_policy, policy
    start = engine.progress
    sampling = asyncio.ensure_future(engine.generate(task))
    while engine.progress < start + tokens and not sampling.done():
        await asyncio.sleep(0)
    await engine.load_policy(manifest)
    engine._kv_policy = before
    return await sampling


async def pixels(engine: Any, task: Any) -> list[Any]:
    """What vLLM's processor makes of each picture and video of a prompt, as arrays in float32."""
    ids = engine._tokenizer.encode(task.prompt).tolist()
    prompt = {"prompt_token_ids": ids} | engine._tokenizer.shown.open(task.prompt.media)
    [rendered] = await engine._llm.renderer.render_cmpl_async([prompt])
    return [
        item[name].data.float().numpy()
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos"))
        for item in rendered["mm_kwargs"].get(kind, [])
    ]
