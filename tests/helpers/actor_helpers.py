"""A real actor process on a real socket, and the shell of an actor around a made-up engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from zppo.config.cluster import TransportConfig
from zppo.config.topology import (
    DataConfig,
    StudentConfig,
    Topology,
)
from zppo.records import run_directory
from zppo_actors import runtime
from zppo_actors.engines.base import EngineError
from zppo_actors.process import ActorContext
from zppo_actors.sampler.actor import EngineActor
from zppo_protocol.messages import (
    AnyMessage,
    Credits,
    GenerateTask,
    Welcome,
)
from zppo_protocol.samples import GroupSamples
from zppo_protocol.sockets import Router

WAIT_SECONDS = 600.0
Wanted = TypeVar("Wanted")


class Stage:
    """A run directory, a runtime folder, the controller's socket, and one actor process."""

    def __init__(self, tmp_path: Path, topology: Topology) -> None:
        self.run = tmp_path / "run"
        self.record = run_directory.create(self.run, topology)
        self.folder, self._lock = runtime.create(self.record.run_id)
        roles = {f"{role}-0": role for role in ("rollout", "teacher", "grader")}
        self.router = Router(runtime.issue_keys(self.folder, roles))
        self.process: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self.name = ""
        self._early: list[AnyMessage] = []

    def start(self, role: str) -> None:
        self.name = f"{role}-0"
        read_end, self._pipe = os.pipe()
        command = [
            sys.executable,
            "-m",
            "zppo_actors",
            role,
            "--run",
            str(self.run),
            "--runtime",
            str(self.folder),
        ]
        command += ["--actor", self.name, "--incarnation", "1", "--parent-fd", str(read_end)]
        log = (self.run / "logs" / f"{self.name}.log").open("wb")
        self.process = subprocess.Popen(command, pass_fds=(read_end,), stdout=log, stderr=log)
        os.close(read_end)
        log.close()

    def send(self, message: AnyMessage) -> None:
        assert self.router.send(self.name, message)

    def next(self, wanted: type[Wanted]) -> Wanted:
        """The next message of this type; others are kept for later."""
        for message in self._early:
            if isinstance(message, wanted):
                self._early.remove(message)
                return message
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            alive = self._alive()
            received = self.router.receive(0.2)
            if received is None and not alive:
                break
            if received is not None and isinstance(received[1], wanted):
                return received[1]
            if received is not None:
                self._early.append(received[1])
        pytest.fail(f"no {wanted.__name__} came; log: {self.log()}")

    def _alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def seen(self, kind: type[Any]) -> bool:
        """Whether a message of this type came and was not taken."""
        return any(isinstance(message, kind) for message in self._early)

    def credits(self, count: int) -> None:
        """Take exactly `count` credits."""
        while count > 0:
            count -= self.next(Credits).count
        assert count == 0

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(WAIT_SECONDS)

    def log(self) -> str:
        return (self.run / "logs" / f"{self.name}.log").read_text()

    def close(self) -> None:
        self.router.close()
        if self._pipe is not None:
            os.close(self._pipe)
        if self.process is not None:
            self.process.wait(WAIT_SECONDS)
        os.close(self._lock)
        shutil.rmtree(self.folder, ignore_errors=True)


class Line:
    """A dealer without a socket: plays the controller's messages, notes the actor's."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[AnyMessage] = asyncio.Queue()
        self.sent: list[AnyMessage] = []

    async def receive(self) -> AnyMessage:
        return await self.incoming.get()

    async def send(self, message: AnyMessage) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    def all(self, kind: type[Wanted]) -> list[Wanted]:
        return [message for message in self.sent if isinstance(message, kind)]


class Moody:
    """An engine that ends its sequences as told by `plans`: how many at a time, and whether it
    fails in the end."""

    capacity, policy_version, progress = 100, -1, 0

    def __init__(self, plans: dict[str, tuple[list[int], bool]]) -> None:
        self.plans = plans
        self.broken: str | None = None

    async def generate(self, task: GenerateTask, finished: Callable[[int], None]) -> GroupSamples:
        ends, fails = self.plans[task.task_id]
        for count in ends:
            await asyncio.sleep(0)
            finished(count)
        if fails:
            raise EngineError("moody", retryable=True)
        ids, log_probs = np.zeros(task.n, dtype=np.int32), np.zeros(task.n, dtype=np.float32)
        offsets, spans = (
            np.arange(task.n + 1, dtype=np.int32),
            np.array([[task.n, -1]], dtype=np.int32),
        )
        return GroupSamples(
            prompt_ids=ids[:1],
            token_ids=ids,
            log_probs=log_probs,
            offsets=offsets,
            version_spans=spans,
            texts=["x"] * task.n,
            finish_reasons=["stop"] * task.n,
        )


def start_actor(
    engine: Moody, line: Line, messages: list[AnyMessage], heartbeat_seconds: float
) -> asyncio.Task[int]:
    """A teacher actor with these messages before it."""
    topology = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        transport=TransportConfig(heartbeat_seconds=heartbeat_seconds),
    )
    context = ActorContext(Path(), Path(), "teacher-0", "teacher", 0, topology, "run", 0)
    for message in [Welcome(heartbeat_seconds=heartbeat_seconds), *messages]:
        line.incoming.put_nowait(message)
    return asyncio.create_task(EngineActor(context, engine, line, "teacher").run())  # type: ignore[arg-type]
