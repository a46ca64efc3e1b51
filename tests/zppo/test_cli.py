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


FORBIDDEN = """\
import sys
from pathlib import Path
from zppo import cli

def refused(arguments):
    raise PermissionError(13, "Permission denied", "/models/student/config.json")

cli.COMMANDS["doctor"] = refused
sys.argv = ["zppo", "doctor"]
sys.exit(cli.console())
"""


def test_what_this_user_may_not_read_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", FORBIDDEN], capture_output=True, text=True)
    assert done.stderr == (
        "/models/student/config.json: Permission denied; expected what this user may use\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
