"""A further host whose memory for runtime folders is full."""

from __future__ import annotations

import os
from pathlib import Path

from unshared import MOUNTS, run_unshared

SCRIPT = """
import os, subprocess, sys
from zppo.errors import UserError
from zppo_actors.hosts.attempt import HostAttempt
from zppo_protocol import keys
from zppo_protocol.messages import HostOrders

base = os.environ["ZPPO_RUNTIME_DIR"]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", base], check=True)
for record, names in ((bytes(1 << 20), []), (bytes(52 << 10), [f"r{i}" for i in range(9)])):
    _, made = keys.issue("tcp://127.0.0.1:1", dict.fromkeys(names, "rollout"))
    secrets = {name: keys.pack_credentials(one) for name, one in made.items()}
    orders = HostOrders(attempt="a1", record=record, secrets=secrets, actors=[], received={})
    try:
        HostAttempt("node-1", orders)
    except UserError as error:
        print(error, os.listdir(base))
"""


def test_it_is_said_which_memory_and_nothing_is_left_there(runtime_base: Path) -> None:
    done = run_unshared(MOUNTS, SCRIPT)
    folder = str(runtime_base / f"zppo-{os.getuid()}-a1-node-1")
    full = "No space left on device"
    expected = "expected room there, or ZPPO_RUNTIME_DIR on that host with a larger folder []\n"
    first, second = done.stdout.splitlines(keepends=True)
    assert first == f"the runtime folder {folder!r} cannot be written ({full}); {expected}"
    assert second.startswith(f"the runtime folder {folder!r} cannot be written (cannot write the")
    assert second.endswith(f"{full}); {expected}"), done.stderr
