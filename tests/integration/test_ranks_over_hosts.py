"""Two ranks of a trainer in two network namespaces: they take the steps of one, and a link that is
cut ends both, each with a sentence, within the limit of a collective."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks_over_hosts
import torch
from ranks_over_hosts import ADDRESSES, CASE
from safetensors.torch import load_file
from trainer_ranks import train

from zppo.training.ranks import ALONE

PATIENCE = 600.0
NAMES = [f"zppo-rank-{os.getpid()}-{i}" for i in range(2)]

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why there can be no namespaces here, if so."""
    if shutil.which("ip") is None:
        return "there is no ip (iproute2)"
    made = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "network namespaces need root"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by one link, and nothing else."""
    if reason := why_not():
        pytest.skip(reason)
    links = [f"zr{os.getpid() % 100000}-{i}" for i in range(2)]
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", NAMES[0], "type", "veth", "peer", "name", links[1],
           "netns", NAMES[1])  # fmt: skip
        for name, link, address in zip(NAMES, links, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield links
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def started(rank: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, ranks_over_hosts.__file__, str(rank), str(folder)]
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[rank], *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def until(condition: Path, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition.exists():
        for rank in ranks:
            assert rank.poll() is None, rank.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_on_two_hosts(hosts: list[str], tmp_path: Path) -> None:
    ranks = [started(0, tmp_path)]
    try:
        until(tmp_path / "port", ranks)
        ranks.append(started(1, tmp_path))
        for rank in range(2):
            until(tmp_path / f"trained-{rank}", ranks)
        alone = train(CASE, ALONE).tensors
        found = load_file(tmp_path / "outcome.safetensors")
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)

        ip("-n", NAMES[1], "link", "set", hosts[1], "down")
        for rank in ranks:
            said = rank.communicate(timeout=PATIENCE)[0]
            assert "another rank of the trainer has ended or does not answer" in said
            assert rank.returncode == 1, said
    finally:
        for rank in ranks:
            rank.kill()
