"""The console script as a process."""

from __future__ import annotations

import subprocess
import sys

INTERRUPTED = """\
import os, signal, sys
from zppo.cli import console

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "zppo.compare":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["zppo", "compare"]
sys.exit(console())
"""


def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
