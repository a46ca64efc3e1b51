"""Hosts that are network namespaces of this machine, joined by a bridge: each has an address of its
own and a line that can be cut. They share processes, files and clocks."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest

PREFIX = "10.213.7."


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """`count` hosts. Skips the test where the system does not allow namespaces."""

    def __init__(self, count: int) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2")
        self._tag = f"zppo{os.getpid()}"
        self.names = [f"{self._tag}-{i}" for i in range(count)]
        self._bridge = f"{self._tag}-b"
        try:
            ip("netns", "add", self._bridge)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            pair = ("eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}")
            ip("link", "add", *pair, "netns", self._bridge)
            ip("-n", self._bridge, "link", "set", f"port{i}", "master", "br0", "up")
            ip("-n", name, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def address(self, host: int) -> str:
        return f"{PREFIX}{host + 1}"

    def start(self, host: int, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """A process of this host."""
        inside = ["ip", "netns", "exec", self.names[host], *command]
        return subprocess.Popen(inside, text=True, **options)

    def cut(self, host: int) -> None:
        """Nothing gets to the host or from it any more."""
        ip("-n", self._bridge, "link", "set", f"port{host}", "down")

    def restore(self, host: int) -> None:
        ip("-n", self._bridge, "link", "set", f"port{host}", "up")

    def close(self) -> None:
        for name in (*self.names, self._bridge):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
