"""The console script as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """\
import os, signal, sys
from zppo.cli import console

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "zppo.compare":
            os.kill(os.getpid(), int(sys.argv.pop()))

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv[:1] = ["zppo", "compare"]
sys.exit(console())
"""


FAILING = """\
import sys
from zppo import cli

def refused(arguments):
    raise {error}

cli.COMMANDS["doctor"] = refused
sys.argv = ["zppo", "doctor"]
sys.exit(cli.console())
"""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("13, 'Permission denied', '/a'", "/a: Permission denied; expected what this user may use"),
        ("2, 'No such file', '/a'", "/a: No such file; expected what is there"),
        ("28, 'No space left'", "a file: No space left; expected room for what is written"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(raised: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING.format(error=f"OSError({raised})")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{said}\n")


def test_code_that_leaves_with_words_ends_a_command_as_it_ends_python() -> None:
    leaving = FAILING.format(error="SystemExit('expected the package foo')")
    done = subprocess.run([sys.executable, "-c", leaving], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "expected the package foo\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_modules_are_imported_is_one_line(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number))],
        capture_output=True,
        text=True,
        # Under nohup the hang-up would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


PIPED = """\
import sys
from zppo import cli

cli.COMMANDS["doctor"] = lambda arguments: print("a" * {length}) or 0
sys.argv = ["zppo", "doctor"]
sys.exit(cli.console())
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
@pytest.mark.parametrize("length", [1, 10**6])
def test_an_output_without_room_is_one_line(length: int) -> None:
    command = [sys.executable, "-c", PIPED.format(length=length)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "the output cannot be written (No space left on device); expected room where it is led to\n",
    )


@pytest.mark.parametrize("length", [1, 10**6])
def test_a_reader_that_has_gone_is_no_traceback(length: int) -> None:
    """With `| head`; short words are only written when the command ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PIPED.format(length=length)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", ["init", "launch"])
def test_a_help_that_nobody_takes_ends_like_every_other_output(command: str) -> None:
    """Short ones and long ones; argparse, which shows them, would pass over it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "zppo", command, "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_output_that_is_closed_is_no_error() -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-P", "-m", "zppo", "--version"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_no_reader_that_has_gone() -> None:
    script = FAILING.format(error="BrokenPipeError")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "BrokenPipeError"


def test_what_has_no_name_is_no_file_that_this_user_may_not_read() -> None:
    """As when a port is another's; its traceback says more than a sentence about files."""
    script = FAILING.format(error="PermissionError(13, 'Permission denied')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "PermissionError: [Errno 13] Permission denied"
    assert done.returncode == 1


def test_module_and_package_are_the_console_script() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-P", "-m", module, "launhc"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        for module in ("zppo", "zppo.cli")
    ]
    assert {(one.returncode, one.stdout, one.stderr) for one in said} == {
        (2, "", "zppo: there is no command 'launhc' (did you mean 'launch'?)\n")
    }


PLANNED = """\
import sys
from zppo.cli import console
sys.argv = ["zppo", "plan", {topology!r}, "--json"]
code = console()
print(code, "transformers" in sys.modules, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_plan_loads_tokenizers_and_no_torch() -> None:
    topology = str(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    script = PLANNED.format(topology=topology)
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stderr == "0 True False\n"
