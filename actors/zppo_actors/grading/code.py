"""The reward `code`: runs a response's program, and the tests of its row behind it.

What it protects from: endless loops and sleep, memory, large files, many open files, and files of
the current folder, which is an empty one of its own. A program that leaves before its tests have
run does not pass. What it does not protect from: a program may read every file that this user may
read, its own tests and the word that says it passed among them, use the network, and kill processes
of this user. Models that are trained against tests do try such things; run the whole training in a
container of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zppo.grading.rewards import CodeArguments, Reward, RewardError
from zppo.signals import die_with_parent

_BLOCK = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)```", re.DOTALL)
MAX_FILE = 16 * 2**20
MAX_OPEN_FILES = 64
MAX_END = 256
"""Bytes of its output that are looked at."""
WALL_FACTOR = 2.0
"""How many times its processor time a program may take on the clock."""


def passes(response: str, row: dict[str, Any], arguments: CodeArguments) -> Reward:
    """1 if the last fenced block of Python in the response runs, and then the tests of the row
    without an error; else 0. Raises RewardError for a row without tests."""
    tests = row.get(arguments.tests)
    if not isinstance(tests, str):
        raise RewardError(f"found no text in the column {arguments.tests!r} of the row")
    blocks = _BLOCK.findall(response)
    if not blocks:
        return Reward(value=0.0, note="no program")
    word = secrets.token_hex(16)
    ended, said = _run(f"{blocks[-1]}\n\n{tests}\n\nprint({word!r})\n", arguments)
    passed = ended == 0 and said.strip().endswith(word.encode())
    return Reward(value=float(passed), note="" if passed else f"exit code {ended}")


def _run(program: str, arguments: CodeArguments) -> tuple[int, bytes]:
    """The exit code, negative that of a signal, and the end of what was printed."""
    with (
        # What the program does to its folder must not turn "wrong" into "no reward".
        tempfile.TemporaryDirectory(prefix="zppo-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
    ):
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "program.py"],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _limit(arguments),
        )
        try:
            ended = process.wait(WALL_FACTOR * arguments.seconds)
        except subprocess.TimeoutExpired:
            ended = -signal.SIGKILL
        finally:
            # Its own children too, as far as they have not left its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(max(0, out.seek(0, os.SEEK_END) - MAX_END))
        return ended, out.read()


def _limit(arguments: CodeArguments) -> None:
    """In the child, before its program: it ends with the grading worker, and within its limits."""
    die_with_parent(signal.SIGKILL)
    seconds, memory = max(1, round(arguments.seconds)), arguments.memory_mib * 2**20
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, MAX_FILE),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit set from outside stays
            resource.setrlimit(what, (most, most))
