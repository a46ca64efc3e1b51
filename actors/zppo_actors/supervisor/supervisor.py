"""The supervisor: it brings a run to its end in as many attempts as it takes, shows what happens,
and leaves nothing behind.

A new attempt begins from the last whole checkpoint when the controller or the trainer died, as
often as `run.max_restarts` allows. The invariant: when `supervise` returns, no process of the run
is left and its runtime folder is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from zppo.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PrintableFormatter,
    UserError,
    printable,
)
from zppo.records import checkpoint
from zppo.records.run_directory import count_death, hold, read, renew
from zppo.signals import Interrupts, keep_exit_codes
from zppo_actors import runtime
from zppo_actors.supervisor import children
from zppo_actors.supervisor.fleet import Fleet
from zppo_actors.supervisor.gathering import Interrupted, gathered
from zppo_actors.supervisor.listening import opened, raise_file_limit
from zppo_actors.supervisor.run_attempt import (
    Commands,
    End,
    RunAttempt,
    View,
    actor_command,
    backoff_seconds,
)

TICK_SECONDS = 0.1

log = logging.getLogger("zppo.supervisor")


def supervise(
    run_dir: Path,
    view: View,
    interrupts: Interrupts,
    commands: Commands = actor_command,
    fleet: Fleet | None = None,
) -> End:
    """Bring the run to its end, with as many new attempts from the last checkpoint as
    `run.max_restarts` allows. Raises UserError where a port of this host cannot be had."""
    record, number = read(run_dir), 0
    with opened(record.topology) as ears:
        while True:
            attempt = RunAttempt(run_dir, record, number, view, interrupts, commands, fleet, ears)
            end = blamed(run_dir, attempt.run())
            log.info("attempt %d ended: %s", number, end.verdict)
            if not end.renewable or number >= record.topology.run.max_restarts:
                return end
            found = checkpoint.find_latest(run_dir)
            for warning in found.warnings:
                view.log(warning)
            view.log(f"{end.verdict}; the run begins again from step {found.step}")
            if _interrupted_within(backoff_seconds(number), interrupts):
                verdict = "stopped between two lives of the run"
                return End(verdict=verdict, exit_code=EXIT_INTERRUPTED)
            record, number = renew(run_dir, found.step), number + 1


def blamed(run_dir: Path, end: End) -> End:
    """A window that the trainer died on is remembered, and named once it has done so again."""
    if end.window is None:
        return end
    record = count_death(run_dir, end.window)
    if end.window not in record.redraws:
        return end
    times = record.trainer_deaths[end.window]
    why = f"it died {times} times on window {end.window}, whose samples are drawn again"
    return structs.replace(end, verdict=f"{end.verdict} ({why})")


def main(argv: Sequence[str]) -> int:
    """Supervise the run in `--run DIR`; returns 0 finished, 1 failed, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m zppo_actors supervisor", description="Supervisor of one run."
    )
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR")
    parser.add_argument("--keys", type=Path, metavar="FOLDER")
    asked = parser.parse_args(argv)
    run_dir: Path = asked.run.absolute()
    key_folder: Path = asked.keys or key_folder_of(run_dir)
    read(run_dir)
    # The lock is never given back: it goes with this process.
    if hold(run_dir) is None:
        raise UserError(f"run.directory: {str(run_dir)!r} is in use by another run")
    _start_log(run_dir)
    keep_exit_codes()
    raise_file_limit()
    for folder in runtime.sweep():
        log.info("removed %s, which a dead run had left", folder)
    interrupts = Interrupts()
    with interrupts.listening():
        view = _live_view(run_dir)
        try:
            with gathered(run_dir, read(run_dir), key_folder, view, interrupts) as fleet:
                end = supervise(run_dir, view, interrupts, fleet=fleet)
        except Interrupted:
            end = End(verdict="stopped before it began", exit_code=EXIT_INTERRUPTED)
        except BaseException:
            view.close()
            raise
        view.close(end.verdict)
    _say(run_dir, end)
    return end.exit_code


def key_folder_of(run_dir: Path) -> Path:
    """Where the key files of further hosts lie unless another folder is named: beside the run
    directory, because nothing in that is secret."""
    return run_dir.with_name(f"{run_dir.name}.keys")


def _interrupted_within(seconds: float, interrupts: Interrupts) -> bool:
    """Wait until `seconds` have passed or an interrupt has come; says whether one has."""
    deadline = time.monotonic() + seconds
    while not interrupts.count and time.monotonic() < deadline:
        time.sleep(TICK_SECONDS)
    return interrupts.count > 0


def _live_view(run_dir: Path) -> View:
    # Imported here so that tests of the supervisor need no terminal library.
    from zppo_actors.supervisor.view import LastingConsole, LiveView

    return LiveView(LastingConsole(), title=run_dir.name)


def _start_log(run_dir: Path) -> None:
    handler = logging.FileHandler(run_dir / "logs" / "supervisor.log")
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _failed(end: End) -> bool:
    """Whether the verdict belongs on stderr."""
    return end.exit_code in (EXIT_FAILED, EXIT_USER_ERROR)


def _say(run_dir: Path, end: End) -> None:
    """Last words below the view's summary: what went wrong, the end of the log that explains it,
    and how to go on.

    The verdict of a failure is in the summary on stdout too; here it is the sentence on stderr.
    """
    lines = [end.verdict] if _failed(end) else []
    if end.log is not None:
        lines += [
            f"the last lines of {end.log}:",
            *(f"  {line}" for line in children.tail(end.log)),
        ]
    if end.exit_code == 0:
        lines.append(f"report: zppo report {shlex.quote(str(run_dir))}")
    elif checkpoint.find_latest(run_dir).folder is not None:
        lines.append(f"continue: zppo launch --resume {shlex.quote(str(run_dir))}")
    with contextlib.suppress(OSError):  # nobody is left to read it
        stream = sys.stderr if _failed(end) else sys.stdout
        print(printable("\n".join(lines)), file=stream, flush=True)
