"""Interrupts as a count, a fork that ends by a signal, and a child that the kernel ends with its
parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from zppo import signals
from zppo.signals import Interrupts

TIMEOUT_SECONDS = 600
PARENT = """
import signal, subprocess, sys, time
from functools import partial
from zppo.signals import die_with_parent
child = subprocess.Popen(
    [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"],
    preexec_fn=partial(die_with_parent, signal.SIGKILL),
)
time.sleep(600)
"""
FORKS = """
import os, signal
from zppo.signals import ends_forks
# Called before what `ends_forks` has called: the signal comes as early as it can.
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
ends_forks(signal.SIGTERM)
child = os.fork()
if not child:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.kill(os.getpid(), signal.SIGTERM)
print(heard)
"""
CTRL_C = """
import os, signal
from zppo.signals import take_for_ctrl_c
take_for_ctrl_c()
for number in signal.SIGTERM, signal.SIGHUP:
    child = os.fork()
    if not child:
        signal.pause()
    os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(CTRL_C, "-15\n-1\n", id="taken for Ctrl-C"),
        pytest.param(FORKS, "-15\n[15]\n", id="however early, and its parent still hears it"),
    ],
)
def test_what_is_forked_ends_by_a_signal_that_its_parent_handles(script: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        # Under nohup the hang-up would be ignored.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
        check=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert (done.stdout, done.stderr) == (said, "")


def test_interrupts_are_counted_and_the_handlers_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupts = Interrupts()
    with interrupts.listening():
        assert interrupts.count == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.count == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_sigterm_that_is_passed_on_as_well_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is the SIGHUP that systemd sends behind it."""
    clock = [100.0]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    interrupts = Interrupts()
    with interrupts.listening():
        for passed, number in (
            (0.0, signal.SIGTERM),
            (0.2, signal.SIGHUP),
            (signals.SAME_SECONDS - 0.3, signal.SIGTERM),
        ):
            clock[0] += passed
            os.kill(os.getpid(), number)
            assert interrupts.count == 1
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.count == 2
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.count == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent")
def test_a_tied_child_ends_with_its_parent() -> None:
    """The child holds the other end of the pipe: its end of file is the end of the child."""
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    parent.kill()
    assert parent.communicate(timeout=TIMEOUT_SECONDS)[0] == b""


CHILD_OF_THE_CARELESS = """
import subprocess, sys
from zppo.signals import keep_exit_codes
keep_exit_codes()
sys.exit(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]).wait())
"""


def test_exit_codes_are_kept_also_where_the_parent_had_them_ignored() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD_OF_THE_CARELESS],
        preexec_fn=partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN),
        timeout=TIMEOUT_SECONDS,
    )
    assert ended.returncode == 3
