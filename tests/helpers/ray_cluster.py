"""A Ray cluster of two nodes, each in a network namespace of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from living import command_of
from namespaces import Network
from runs_over_hosts import PATIENCE, QUICKSTART

RAY = Path(sys.executable).with_name("ray")


class RayCluster:
    """Two nodes of Ray; a run is launched on the first."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(2)
        self.directory = folder / "run"
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
        head = f"{self.network.address(0)}:6399"
        self._node(
            0, "--head", "--port=6399", "--include-dashboard=false", f"--temp-dir={self.temporary}"
        )
        self._node(1, f"--address={head}")

    def _node(self, host: int, *options: str) -> None:
        command = [str(RAY), "start", f"--node-ip-address={self.network.address(host)}", *options]
        command += ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
        started = self.network.start(
            host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        output, _ = started.communicate(timeout=PATIENCE)
        assert started.returncode == 0, output

    def launch(
        self, facts: str = "{}", seconds: int = 300, steps: int = 4
    ) -> subprocess.Popen[str]:
        hosts = f"{{n0: {{address: {self.network.address(0)}}}, n1: {facts}}}"
        settings = {
            "cluster": f"{{launcher: ray, join_seconds: {seconds}, hosts: {hosts}}}",
            "actors.rollout.hosts": "[n1]",
            "actors.rollout.count": 1,
            "scheduler.new_questions": 8,
            "data.heldout": "null",
            "evaluation.every": "null",
            "run.steps": steps,
            "run.directory": self.directory,
        }
        command = [sys.executable, "-P", "-m", "zppo", "launch", str(QUICKSTART)]
        command += [word for item in settings.items() for word in ("--set", "{}={}".format(*item))]
        return self.network.start(
            0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def until_trained(self, run: subprocess.Popen[str]) -> None:
        """Wait for the first step."""
        metrics = self.directory / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while not metrics.exists() or not metrics.read_text():
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def ray_of(self, host: int) -> list[psutil.Process]:
        """The processes of Ray on a node, not those that it runs for others."""
        return [
            process
            for process in self.processes(host)
            if any(name in " ".join(command_of(process)) for name in ("gcs_server", "raylet"))
        ]

    def processes(self, host: int | None = None) -> list[psutil.Process]:
        """Everything that runs in the namespaces, or in one of them."""
        pids: list[str] = []
        for name in self.network.names if host is None else [self.network.names[host]]:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            pids += listed.stdout.split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def named(self, *words: str) -> list[psutil.Process]:
        return [one for one in self.processes() if set(words) <= set(command_of(one))]

    def close(self) -> None:
        """Never `ray stop`, which ends every cluster of the machine."""
        for process in self.processes():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.network.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
