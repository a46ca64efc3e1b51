"""A checkpoint that a suite serves: a real process behind a real socket, in the place of vLLM."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import psutil
import pytest
from unshared import PROCESS_IDS, run_unshared

from zppo.plan.engines.openai import OpenAIArguments
from zppo.plan.server import UNIX
from zppo.suites.order import Served
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_actors.suites.asked import ModelGone
from zppo_actors.suites.children import serving

SERVER = """
import argparse, json, sys
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingUnixStreamServer

parser = argparse.ArgumentParser()
for name in ("uds", "model", "served-model-name", "generation-config"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--fails")
asked = parser.parse_args()
if asked.fails:
    sys.exit("[Errno 98] Address already in use")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": asked.served_model_name}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": f"{asked.model} at {self.path}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


ThreadingUnixStreamServer(asked.uds, Handler).serve_forever()
"""

TAKEN_NUMBER = """
import asyncio, os, subprocess, sys
from pathlib import Path
from zppo_actors.suites.children import started

async def main():
    async with started(["true"], os.environ, Path(sys.argv[1])) as child:
        await child.wait()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(child.pid - 1))
        stranger = subprocess.Popen(["cat", "/dev/zero"], stdout=-3, start_new_session=True)
        assert stranger.pid == child.pid
    print(stranger.poll())
    stranger.kill()
    print(stranger.wait())

asyncio.run(main())
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A checkpoint, and a `vllm` that is found before any other."""
    module = tmp_path / "stand-in/vllm/entrypoints/openai/api_server.py"
    module.parent.mkdir(parents=True)
    for package in list(module.parents)[:3]:
        (package / "__init__.py").touch()
    module.write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    return Served(label="mine", model="student", folder="/models/mine")


def test_a_checkpoint_is_served_where_nobody_else_can_be_or_ask(
    model: Served, tmp_path: Path
) -> None:
    """No port is chosen, so none can be taken; the socket is in a folder of mode 0700."""
    before = set(psutil.Process().children())

    async def asked() -> tuple[str, Path]:
        async with serving(model, {}, 600.0, tmp_path / "server.log") as url:
            [server] = set(psutil.Process().children()) - before
            assert server.net_connections("inet") == []
            engine = OpenAIEngine(OpenAIArguments(base_url=url, api_key_env=None), "student", None)
            body = {"model": "student", "messages": [{"role": "user", "content": "Who?"}]}
            reply = await engine.ask(body, 1, 8)
            await engine.close()
            path = Path(url.removeprefix(UNIX))
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            return reply.choices[0].text, path

    text, path = asyncio.run(asked())
    assert text == "/models/mine at /v1/chat/completions"
    assert not path.parent.exists() and set(psutil.Process().children()) <= before


def test_a_server_that_ends_is_not_waited_for(model: Served, tmp_path: Path) -> None:
    log = tmp_path / "server.log"

    async def asked() -> None:
        async with serving(model, {"fails": "yes"}, 600.0, log):
            pass

    with pytest.raises(ModelGone) as caught:
        asyncio.run(asked())
    assert str(caught.value) == (
        f"the server of mine ended with code 1 (log: {log}): [Errno 98] Address already in use"
    )


def test_a_stranger_with_the_number_of_a_program_that_has_ended_lives_on(tmp_path: Path) -> None:
    done = run_unshared(PROCESS_IDS, TAKEN_NUMBER, str(tmp_path / "log"))
    assert done.stdout == "None\n-9\n", done.stderr
