"""What every actor process is before it is a role: its context, its signals, its log, and its tie
to the supervisor.

Invariant: no actor outlives its supervisor. The supervisor keeps the writing end of a pipe and
never writes; a thread here reads the other end, so its end of file means that the supervisor is
gone, in whatever way. On Linux the kernel kills all actors but the controller as well, because
native code that never returns would keep that thread waiting; the controller runs no such code and
removes the runtime folder before it leaves.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from zppo.config.topology import Topology
from zppo.errors import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    Output,
    PrintableFormatter,
    ReaderGone,
    UserError,
)
from zppo.records.run_directory import read
from zppo.records.timeline import TIMELINE
from zppo.signals import die_with_parent, ends_forks
from zppo_actors import runtime
from zppo_actors.timeline import Timeline, begin_life
from zppo_protocol.errors import AccessError
from zppo_protocol.keys import Credentials
from zppo_protocol.limits import Limits, limits_for
from zppo_protocol.messages import PROTOCOL_VERSION, Hello
from zppo_protocol.values import Role

ROLES = {
    "controller": "zppo_actors.controller.controller",
    "rollout": "zppo_actors.sampler.rollout",
    "teacher": "zppo_actors.sampler.teacher",
    "grader": "zppo_actors.grader",
    "trainer": "zppo_actors.trainer.actor",
    "rank": "zppo_actors.trainer.rank",
    "weights": "zppo_actors.weights.actor",
}
"""Role -> module with `main(context) -> int`; only the one that is started is imported."""

log = logging.getLogger("zppo")


@dataclass(frozen=True)
class ActorContext:
    """Where and who an actor is. `start_version` is the policy version that this attempt at the run
    begins with."""

    run_dir: Path
    runtime: Path
    actor: str
    role: str
    incarnation: int
    topology: Topology
    run_id: str
    start_version: int
    extensions: dict[str, str] = field(default_factory=dict)
    """What identified the user's own code when the run began, by its name in the topology."""
    timeline: Timeline = field(default_factory=Timeline)
    """Where this process says what it did when."""
    ear: int | None = None
    """The descriptor of the socket that others know to listen here; its port cannot be taken by
    anybody else. None: this process listens on none that was bound before it began."""

    @property
    def credentials(self) -> Credentials:
        """With which this actor is let in by the controller. Raises AccessError."""
        return runtime.credentials(self.runtime, self.actor)

    @property
    def limits(self) -> Limits:
        """What a message of this run may hold."""
        return limits_for(self.topology.transport.max_message_mib)

    def hello(self, role: Role, capacity: int) -> Hello:
        """The first word of this actor to the controller."""
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=self.run_id,
            actor=self.actor,
            role=role,
            incarnation=self.incarnation,
            pid=os.getpid(),
            capacity=capacity,
        )

    @property
    def index(self) -> int:
        """Number of this actor among those of its role, e.g. 1 for `rollout-1`."""
        _, _, number = self.actor.rpartition("-")
        return int(number) if number.isdigit() else 0


def main(argv: Sequence[str]) -> int:
    """Run one actor as `ROLE --run … --runtime … --actor … --incarnation … --parent-fd …`; returns
    its exit code."""
    arguments = _parser().parse_args(argv)
    runtime_folder = Path(arguments.runtime)
    tie_to_supervisor(
        arguments.parent_fd, runtime_folder, kernel_too=arguments.role != "controller"
    )
    set_signals()
    start_log()
    return guarded(lambda: _run_role(arguments, runtime_folder))


def guarded(body: Callable[[], int]) -> int:
    """Run `body`; a UserError or AccessError becomes one sentence on stderr and exit code 2,
    anything else a traceback and 1, but for a reader that has gone (`run_command`)."""
    try:
        return body()
    except ReaderGone:
        raise
    except (UserError, AccessError) as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Exception:
        log.exception("stopped by an unexpected error")
        return EXIT_FAILED


def tie_to_supervisor(parent_fd: int, runtime_folder: Path, *, kernel_too: bool) -> None:
    """End this process when the supervisor has ended."""
    if kernel_too:
        die_with_parent(signal.SIGKILL)
    os.set_inheritable(parent_fd, False)
    threading.Thread(
        target=_wait_for_end, args=(parent_fd, runtime_folder), daemon=True, name="parent"
    ).start()


def set_signals() -> None:
    """Ctrl-C and SIGTERM are the supervisor's business, which a batch system or systemd sends to
    all processes of a run alike; SIGUSR1 prints where every thread is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not ignored: a program that this process starts would inherit that, and so could not be ended.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    ends_forks(signal.SIGTERM)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def start_log() -> None:
    """Log to stderr, which the supervisor leads into `logs/NAME.log`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _wait_for_end(parent_fd: int, runtime_folder: Path) -> None:
    while os.read(parent_fd, 1):
        pass
    runtime.remove(runtime_folder)
    # Not sys.exit, which would end this thread alone.
    os._exit(EXIT_FAILED)


def _run_role(arguments: argparse.Namespace, runtime_folder: Path) -> int:
    run_dir = Path(arguments.run)
    record = read(run_dir)
    if arguments.ear is not None:
        os.set_inheritable(arguments.ear, False)
    life = begin_life(record.run_id, arguments.actor, arguments.incarnation)
    # The controller's part is what nobody else is at work in.
    timeline = Timeline() if arguments.role == "controller" else Timeline(run_dir / TIMELINE, life)
    context = ActorContext(
        run_dir=run_dir,
        runtime=runtime_folder,
        actor=arguments.actor,
        role=arguments.role,
        incarnation=arguments.incarnation,
        topology=record.topology,
        run_id=record.run_id,
        start_version=record.start_step,
        extensions=record.extensions,
        timeline=timeline,
        ear=arguments.ear,
    )
    # Imported late: a grader should not wait for, or pay the memory of, what only a trainer needs.
    module = importlib.import_module(ROLES[arguments.role])
    try:
        exit_code: int = module.main(context)
    finally:
        timeline.close()
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zppo_actors", description="One actor process of a run."
    )
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--run", required=True, metavar="RUN_DIR")
    parser.add_argument("--runtime", required=True, metavar="FOLDER")
    parser.add_argument("--actor", required=True, metavar="NAME")
    parser.add_argument("--incarnation", required=True, type=int, metavar="N")
    parser.add_argument("--parent-fd", required=True, type=int, metavar="FD")
    parser.add_argument("--ear", type=int, metavar="FD")
    return parser


def private_stdout() -> TextIO:
    """Standard output for the report alone; whatever a library prints goes to stderr."""
    stdout = Output(os.fdopen(os.dup(1), "wb"), encoding="utf-8")
    os.dup2(2, 1)
    return stdout
