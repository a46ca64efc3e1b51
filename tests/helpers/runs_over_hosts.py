"""A run over several hosts, which are network namespaces of this machine: a launcher on the first,
agents on the others, and what a test asks of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from namespaces import Network

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
PATIENCE = 900.0
SETTINGS = {
    "scheduler.new_questions": 8,
    "data.heldout": "null",
    "evaluation.every": "null",
    "actors.rollout.count": 1,
    "actors.rollout.hosts": "[n1]",
    "actors.rollout.engine_args.max_sequences": 32,
    "actors.teacher.engine_args.max_sequences": 16,
}


class Cluster:
    """`count` hosts; a run on the first, agents on the others."""

    def __init__(self, folder: Path, count: int) -> None:
        self.network = Network(count)
        self.directory = folder / "run"
        self.keys = folder / "run.keys"
        self.launcher: subprocess.Popen[str] | None = None
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def launch(self, *words: str, **settings: Any) -> None:
        hosts = {
            f"n{i}": {"address": self.network.address(i)} for i in range(len(self.network.names))
        }
        chosen = {
            **SETTINGS,
            "cluster.hosts": json.dumps(hosts),
            "run.directory": self.directory,
            **settings,
        }
        command = [sys.executable, "-P", "-m", "zppo", "launch", *(words or (str(QUICKSTART),))]
        for name, value in chosen.items() if not words else settings.items():
            command += ["--set", f"{name}={value}"]
        self.launcher = self.network.start(
            0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def join(self, host: int, within: Sequence[str] = ()) -> None:
        """Start the agent of a host, as the last words of the command `within`."""
        command = [*within, sys.executable, "-P", "-m", "zppo", "join", "--key"]
        self.agents[host] = self.network.start(
            host,
            [*command, str(self.keys / f"n{host}.key"), "--wait", "300"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        assert self.launcher is not None
        while not condition():
            assert self.launcher.poll() is None, f"it ended early:\n{self.wait()}\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def steps(self) -> int:
        file = self.directory / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def log(self, name: str) -> str:
        file = self.directory / "logs" / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def logs(self) -> str:
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)

    def actor(self, name: str) -> psutil.Process | None:
        """A living process of this run by the name of its actor, on whatever host."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if name in line and "--actor" in line and self.is_ours(process):
                return process
        return None

    def is_ours(self, process: psutil.Process) -> bool:
        """Whether it descends from this test."""
        try:
            return psutil.Process() in process.parents()
        except psutil.Error:
            return False

    def wait(self) -> str:
        """Wait for the end of the run; what it has printed."""
        assert self.launcher is not None
        output, _ = self.launcher.communicate(timeout=PATIENCE)
        return output

    def finish(self) -> dict[str, Any]:
        """Wait for a good end everywhere; the summary of the report."""
        output = self.wait()
        assert self.launcher is not None
        assert self.launcher.returncode == 0, output + self.logs()
        for host, agent in self.agents.items():
            said, _ = agent.communicate(timeout=PATIENCE)
            assert agent.returncode == 0 and said.endswith(f"n{host}: the run has ended\n"), said
        assert not self.keys.exists()
        command = [sys.executable, "-P", "-m", "zppo.report", str(self.directory), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        summary: dict[str, Any] = json.loads(done.stdout)
        assert summary["trained_twice"] == 0 and summary["lost"] == 0
        return summary

    def close(self) -> None:
        for process in [self.launcher, *self.agents.values()]:
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
        self.network.close()
