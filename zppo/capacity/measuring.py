"""`--calibrate`: a process of its own loads the engines and the trainer and measures them; here it
is started, waited for and, when its time is over, ended.

It has a session of its own, so that whatever it starts can be ended with it, and no Ctrl-C of the
terminal: this process hears it and ends the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from zppo.config.topology import OPENAI, Topology
from zppo.errors import EXIT_USER_ERROR, UserError
from zppo.plan.plan import Plan
from zppo.plan.processes import asked_teachers
from zppo.records.run_directory import make_runtime_folder, new_run_id, runtime_base
from zppo.signals import Interrupts, die_with_parent
from zppo.simulation import Calibration

AT = "calibrate: "
"""How lines begin in which the measuring process says what it is doing."""
LOOK_SECONDS = 0.1
MEASURED_SHARE = 0.8
"""Part of the time that the measuring process plans with; it is ended after all of it."""


class Order(Struct, frozen=True, kw_only=True):
    """What the measuring process is asked for. `groups` are those of a full window, `threads` the
    CPU threads of a process of each pool, `folder` is where weights are published."""

    topology: Topology
    seconds: float
    groups: int
    threads: dict[str, int]
    folder: str


class MeasuredHere(Struct, frozen=True, kw_only=True):
    """Its answer."""

    calibration: Calibration
    notes: list[str]


def measured(plan: Plan, within: float) -> MeasuredHere:
    """Load and measure what the plan runs, in at most `within` seconds. Raises UserError where that
    fails, KeyboardInterrupt when it was ended from outside."""
    ranks = len(plan.topology.actors.trainer.rank_devices)
    if ranks > 1:
        raise UserError(
            f"--calibrate: measures a trainer of one rank, and here it has {ranks}; write its "
            "speed by hand (docs/plan.md), or use --from-run"
        )
    for one in asked_teachers(plan.topology):
        if one.actor.engine == OPENAI:
            raise UserError(
                f"--calibrate: {one.section} is behind a server, which is not asked for a "
                "measurement; write its speeds by hand (docs/plan.md), or use --from-run"
            )
    with calibration_folder() as folder, tempfile.TemporaryFile() as log:
        order = Order(
            topology=plan.topology,
            seconds=within * MEASURED_SHARE,
            groups=plan.windows.groups,
            threads={entry.pool: entry.threads for entry in plan.processes},
            folder=str(folder),
        )
        return _answer(order, within, log)


@contextlib.contextmanager
def calibration_folder() -> Iterator[Path]:
    """A folder in shared memory for published weights. It is named and locked as that of a run, so
    if this process is killed the next run takes it away. Raises UserError."""
    try:
        folder, lock = make_runtime_folder(f"calibrate-{new_run_id()}", runtime_base())
    except UserError as error:
        raise UserError(f"--calibrate: {error}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _answer(order: Order, within: float, log: BinaryIO) -> MeasuredHere:
    command = [sys.executable, "-P", "-m", "zppo_actors", "calibrate"]
    stop = Interrupts()
    with stop.listening():
        process = subprocess.Popen(
            [*command, msgspec.json.encode(order).decode()],
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
        try:
            out = _output(process, time.monotonic() + within, stop)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--calibrate: was not done within {within:g} s, while {_doing(log)}; give it more "
                "with --within"
            ) from None
        finally:
            _end(process)
    if process.returncode == EXIT_USER_ERROR:
        raise UserError(_lines(log)[-1])
    if process.returncode != 0:
        raise UserError(
            f"--calibrate: failed while {_doing(log)} ({_reason(process.returncode, log)}); "
            "zppo plan without --calibrate says what the run needs"
        )
    return msgspec.json.decode(out, type=MeasuredHere)


def _output(process: subprocess.Popen[bytes], deadline: float, stop: Interrupts) -> bytes:
    """What it prints. Raises KeyboardInterrupt when this process is told to end, TimeoutExpired."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, _ = process.communicate(timeout=LOOK_SECONDS)
            if not stop.count:
                return out
        if stop.count:
            raise KeyboardInterrupt
        if time.monotonic() >= deadline:
            raise subprocess.TimeoutExpired(process.args, deadline)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it has started, if it has not ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(log: BinaryIO) -> list[str]:
    log.seek(0)
    return log.read().decode("utf-8", "replace").strip().splitlines() or [""]


def _doing(log: BinaryIO) -> str:
    said = [line.removeprefix(AT) for line in _lines(log) if line.startswith(AT)]
    return said[-1] if said else "starting"


def _reason(code: int, log: BinaryIO) -> str:
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}; is there enough memory?"
    return _lines(log)[-1][:300]
