"""One attempt at a run: a set of processes with one run id and one runtime folder, from their start
to their common end.

Engines and graders are restarted within an attempt, with growing pauses and a budget; the death of
the controller or the trainer ends it. The invariant: when `RunAttempt.run` returns, no process of
the attempt is left and its runtime folder is gone.

Consumes `Status`, `RestartActor` and `RunEnded` from the controller, exits of children, Ctrl-C.
Produces `ActorExited` and `StopRequested`. Waits for the controller's `RunEnded`; is unblocked by
the exit of a child and by a second Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct, structs

from zppo.errors import EXIT_FAILED, EXIT_FATAL, EXIT_INTERRUPTED, EXIT_USER_ERROR, count_of
from zppo.plan.processes import ProcessEntry, cores, processes
from zppo.records.run_directory import RunRecord
from zppo.signals import Interrupts
from zppo_actors import runtime
from zppo_actors.own_time import OwnTime
from zppo_actors.supervisor import children
from zppo_actors.supervisor import nursery as nurseries
from zppo_actors.supervisor.children import Birth, Child
from zppo_actors.supervisor.environment import environment
from zppo_actors.supervisor.fleet import Fleet
from zppo_actors.supervisor.listening import Ears
from zppo_actors.supervisor.nursery import Nursery
from zppo_actors.supervisor.resources import resources
from zppo_actors.supervisor.watchdog import Watchdog
from zppo_protocol import keys
from zppo_protocol.messages import (
    PROTOCOL_VERSION,
    ActorExited,
    ActorsMoving,
    AnyMessage,
    Hello,
    RestartActor,
    RunEnded,
    Status,
    StopRequested,
)
from zppo_protocol.values import SUPERVISOR

TICK_SECONDS = 0.1
LEAVE_SECONDS = 10.0
LAST_WORDS_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 10.0
TRAINERS = ("trainer", "rank")
IRREPLACEABLE = ("controller", *TRAINERS)
NO_EARS = Ears()
NOT_BEGUN = "stopped while it started"
FINAL = {EXIT_USER_ERROR: EXIT_USER_ERROR, EXIT_FATAL: EXIT_FAILED}
"""Exit codes of an actor that no restart would mend, and the exit code of the run that they end."""

log = logging.getLogger("zppo.supervisor")


class View(Protocol):
    """What the supervisor needs of the live view."""

    def update(self, status: Status) -> None: ...

    def log(self, line: str) -> None: ...

    def close(self, verdict: str = "") -> None: ...


class End(Struct, frozen=True, kw_only=True):
    """How an attempt ended. `renewable` says whether another may begin from the last checkpoint;
    `window` is the one that the trainer died on."""

    verdict: str
    exit_code: int
    renewable: bool = False
    log: Path | None = None
    window: int | None = None


Commands = Callable[[ProcessEntry], Sequence[str]]


def actor_command(entry: ProcessEntry) -> list[str]:
    """Start of the command line of an actor. `-P` keeps the current folder off the import path."""
    return [sys.executable, "-P", "-m", "zppo_actors", entry.role]


def backoff_seconds(restarts: int) -> float:
    """Pause before restart number `restarts` (from 0): half a second, doubled each time, at most
    ten."""
    return min(LONGEST_BACKOFF_SECONDS, 0.5 * 2.0**restarts)


class RunAttempt:
    """One set of processes from their start to their common end."""

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        number: int,
        view: View,
        interrupts: Interrupts,
        commands: Commands,
        fleet: Fleet | None = None,
        ears: Ears = NO_EARS,
    ) -> None:
        self._fleet, self._ears, self._time = fleet, ears, OwnTime()
        self._run_dir, self._record, self._number = run_dir, record, number
        self._view, self._interrupts, self._commands = view, interrupts, commands
        self._table = {entry.name: entry for entry in processes(record.topology, cores())}
        self._children: dict[str, Child] = {}
        self._left: list[tuple[float, Child]] = []
        self._restarts_due: dict[str, tuple[float, int]] = {}
        here = [entry for entry in self._table.values() if not self._is_further(entry)]
        # One with an ear is spawned: all that are forked have what the nursery inherits.
        here = [entry for entry in here if not ears.of(entry.role)]
        self._forked = nurseries.forked(here) if commands is actor_command else []
        self._nursery: Nursery | None = None
        self._reasons: dict[tuple[str, int], str] = {}
        self._ended: RunEnded | None = None
        self._end: End | None = None
        self._stopping = False
        self._deadline = float("inf")
        self._watchdog = Watchdog(record.topology)

    def run(self) -> End:
        """Start everything, watch until the run has ended, and clear everything away."""
        roles = {entry.name: entry.role for entry in self._table.values()}
        with resources(self._record, roles, self._ears) as self._resources:
            try:
                self._resources.dealer.send(self._hello())
                if self._fleet is not None:
                    self._fleet.begin(*self._for_further_hosts())
                if self._forked:
                    self._nursery = self._open_nursery()
                now = self._time.now()
                for name, entry in self._table.items():
                    if self._is_further(entry):
                        self._restarts_due[name] = (now, 0)  # as soon as its host is there
                    else:
                        self._start(name, incarnation=0)
                return self._watch()
            finally:
                if self._nursery is not None:
                    self._nursery.close()
                for child in self._children.values():
                    child.kill()
                if self._fleet is not None:
                    self._end_further()

    def _watch(self) -> End:
        while True:
            self._listen(TICK_SECONDS)
            self._heed_interrupts()
            if self._fleet is not None:
                self._look_at(self._fleet)
            self._reap()
            self._look_for_stuck(self._time.now())
            self._judge_the_left()
            self._take_born()
            self._start_due()
            end = self._outcome()
            if end is not None:
                return end

    def _outcome(self) -> End | None:
        late = self._time.now() > self._deadline
        if self._ended is not None and (not self._children or late):
            return self._end or End(verdict=self._ended.verdict, exit_code=self._ended.exit_code)
        if self._interrupts.count >= 2:
            return End(verdict="stopped at once", exit_code=EXIT_INTERRUPTED)
        # An attempt that gives up lets the trainer finish and checkpoint, so its end waits for the
        # controller's last word.
        if self._end is not None and (
            not self._stopping or late or "controller" not in self._children
        ):
            return self._end
        return None

    # ---- messages --------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=self._record.run_id,
            actor=SUPERVISOR,
            role=SUPERVISOR,
            incarnation=self._number,
            pid=os.getpid(),
            capacity=0,
        )

    def _listen(self, seconds: float) -> None:
        """Wait up to `seconds` for a message, then take all that are there."""
        message = self._resources.dealer.receive(seconds)
        while message is not None:
            self._on_message(message)
            message = self._resources.dealer.receive(0.0)

    def _on_message(self, message: AnyMessage) -> None:
        match message:
            case Status():
                self._watchdog.heard(message, self._time.now())
                self._view.update(self._with_earlier_attempts(message))
            case RestartActor():
                self._kill_stuck(message)
            case RunEnded():
                self._ended = message
                self._deadline = self._time.now() + LEAVE_SECONDS
                # Nobody tells these to leave, and they hold nothing yet.
                for child in self._watchdog.unheard(self._children.values()):
                    child.kill()

    def _with_earlier_attempts(self, status: Status) -> Status:
        """The controller counts restarts of actors; that the run itself has begun again it does not
        know."""
        restarts = status.counters.get("restarts", 0) + self._number
        return structs.replace(status, counters={**status.counters, "restarts": restarts})

    def _kill_stuck(self, message: RestartActor) -> None:
        child = self._children.get(message.actor)
        # The incarnation that it speaks of may have ended on its own meanwhile.
        if child is not None and child.incarnation == message.incarnation:
            self._kill(child, message.reason)

    def _look_for_stuck(self, now: float) -> None:
        if not self._watchdog.due(now):
            return
        watched = [*self._children.values()]
        unborn = self._nursery.asked if self._nursery is not None else []
        if self._nursery is not None and unborn:
            watched.append(self._nursery.child)
        moving = self._watchdog.look(watched, now)
        if nurseries.NAME in moving:  # it does the loading of all of them
            moving = [name for name in moving if name != nurseries.NAME] + unborn
        if moving:
            self._resources.dealer.send(ActorsMoving(actors=moving))
        for child, reason in self._watchdog.stuck(watched, now, stopping=self._stopping):
            self._kill(child, reason)

    def _kill(self, child: Child, reason: str) -> None:
        self._reasons[child.name, child.incarnation] = reason
        child.kill()

    def _heed_interrupts(self) -> None:
        if not self._interrupted or self._stopping or self._ended is not None:
            return
        if not self._watchdog.has_heard:
            self._end = self._end or End(verdict=NOT_BEGUN, exit_code=EXIT_INTERRUPTED)
        else:
            self._view.log(
                "stopping: the trainer finishes its step, then a checkpoint; Ctrl-C again stops at "
                "once"
            )
            self._stop("interrupted")

    @property
    def _interrupted(self) -> bool:
        """Also by what has come since `_heed_interrupts` looked in this round."""
        return self._interrupts.count > 0

    def _stop(self, reason: str) -> None:
        self._stopping = True
        self._resources.dealer.send(StopRequested(reason=reason))

    # ---- processes -------------------------------------------------------------------------------

    def _open_nursery(self) -> Nursery:
        log_file = self._run_dir / "logs" / f"{nurseries.NAME}.log"
        entry = ProcessEntry(name=nurseries.NAME, role=nurseries.NAME, pool=nurseries.NAME)
        return Nursery(log_file, environment(entry), self._resources.parent_fd)

    def _take_born(self) -> None:
        if self._nursery is None:
            return
        if self._stopping or self._ended is not None or self._end is not None:
            self._nursery.close()
        for child in self._nursery.turn():
            self._enter(child)

    def _is_further(self, entry: ProcessEntry) -> bool:
        """Whether it is a process of another host."""
        return self._fleet is not None and self._fleet.has(entry.host)

    def _for_further_hosts(self) -> tuple[str, bytes, dict[str, dict[str, bytes]]]:
        """The run id, the run's record, and the keys of each host's processes."""
        secrets: dict[str, dict[str, bytes]] = {}
        for name, entry in self._table.items():
            if self._is_further(entry) and runtime.speaks(entry.role):
                credentials = runtime.credentials(self._resources.folder, name)
                secrets.setdefault(entry.host, {})[name] = keys.pack_credentials(credentials)
        return self._record.run_id, msgspec.json.encode(self._record), secrets

    def _look_at(self, fleet: Fleet) -> None:
        """What is new of the further hosts; a run whose hosts cannot come back ends as it does for
        a part that does not."""
        for line in fleet.turn():
            self._view.log(line)
        sentence = fleet.given_up()
        ending = self._interrupted or self._end is not None or self._ended is not None
        if sentence is not None and not ending:
            assert fleet.keeper is not None
            self._view.log(f"{sentence}; ending the run")
            self._end_early(End(verdict=sentence, exit_code=EXIT_FAILED, log=fleet.keeper.log))

    def _end_further(self) -> None:
        """See to it that nothing of this attempt is left on other hosts."""
        assert self._fleet is not None
        for name in self._fleet.end(LEAVE_SECONDS):
            self._view.log(f"{name} does not answer; its agent ends what runs there")

    def _start(self, name: str, incarnation: int) -> None:
        entry = self._table[name]
        parent_fd, *ear = inherited = self._inherited(entry.role)
        options = {
            "--run": self._run_dir,
            "--runtime": self._resources.folder,
            "--actor": name,
            "--incarnation": incarnation,
            "--parent-fd": parent_fd,
            **({"--ear": ear[0]} if ear else {}),
        }
        command = [
            *self._commands(entry),
            *(str(part) for option in options.items() for part in option),
        ]
        birth: Birth = {
            "name": name,
            "role": entry.role,
            "incarnation": incarnation,
            "log": self._run_dir / "logs" / f"{name}.log",
            "env": {**environment(entry), **self._ears.told(entry.role)},
        }
        if self._nursery is not None and name in self._forked:
            self._nursery.ask(command, **birth)
        elif self._fleet is not None and self._fleet.has(entry.host):
            self._enter(self._fleet.start(entry.host, **birth))
        else:
            self._enter(children.spawn(command, **birth, inherited=inherited))

    def _inherited(self, role: str) -> list[int]:
        """The descriptors that a process of this role has of this one: the pipe, then its ear."""
        return [self._resources.parent_fd, *self._ears.of(role)]

    def _enter(self, child: Child) -> None:
        """From now on this process is one of the attempt."""
        self._children[child.name] = child
        if child.process.reason:
            return  # its end is about to be seen
        log.info(
            "started %s, incarnation %d, process %d",
            child.name,
            child.incarnation,
            child.process.pid,
        )

    def _reap(self) -> None:
        for child in [child for child in self._children.values() if child.ended]:
            del self._children[child.name]
            child.kill()  # what the process itself had spawned
            log.info(
                "%s (incarnation %d, exit code %d)",
                child.ending,
                child.incarnation,
                child.exit_code,
            )
            if child.role == "controller":
                self._hear_last_words()
            if child.exit_code == 0 and child.role != "controller":
                self._left.append((self._time.now() + LEAVE_SECONDS, child))
            elif self._ended is None:
                self._on_death(child)
        if self._nursery is not None:
            keeper = self._fleet.keeper if self._fleet is not None else None
            others = [*self._children.values(), *([keeper] if keeper is not None else [])]
            self._nursery.reap_orphans(others)

    def _hear_last_words(self) -> None:
        """What an ended controller had sent may still be on its way through the socket."""
        deadline = self._time.now() + LAST_WORDS_SECONDS
        while self._ended is None and self._time.now() < deadline:
            self._listen(TICK_SECONDS)

    def _judge_the_left(self) -> None:
        """Who left in order may have been told to by a controller whose last word is still on its
        way."""
        if self._ended is not None or self._stopping:
            return
        due = [child for deadline, child in self._left if deadline <= self._time.now()]
        self._left = [(deadline, child) for deadline, child in self._left if child not in due]
        for child in due:
            self._on_death(child)

    def _on_death(self, child: Child) -> None:
        reason = self._reasons.pop(child.key, "") or child.process.reason
        verdict = f"{child.verdict} because {reason}" if reason else child.verdict
        if child.exit_code in FINAL:
            sentence = (children.tail(child.log, lines=1) or [child.verdict])[0]
            end = End(
                verdict=f"{child.name}: {sentence}",
                exit_code=FINAL[child.exit_code],
                window=self._window_of(child),
            )
            self._give_up(child, end)
        elif child.role in IRREPLACEABLE:
            # Whoever has sent that to all processes, on all hosts, has ended the trainer's ranks
            # there as well.
            interrupted = self._interrupted
            self._end = self._end or End(
                verdict=f"interrupted, and {verdict}" if interrupted else verdict,
                exit_code=EXIT_INTERRUPTED if interrupted else EXIT_FAILED,
                renewable=not interrupted,
                log=child.log,
                window=None if interrupted else self._window_of(child),
            )
            # A last step takes the controller and the trainer: there is nothing to wait for.
            self._stopping = False
        elif self._stopping:
            self._tell(child, verdict, restarting=False)
        elif child.incarnation < self._record.topology.actors.max_restarts:
            self._restart(child, verdict)
        else:
            verdict = f"{verdict} after {count_of(child.incarnation, 'restart')}"
            self._give_up(child, End(verdict=verdict, exit_code=EXIT_FAILED, log=child.log))

    def _window_of(self, child: Child) -> int | None:
        """The window that a dead trainer was at work on."""
        return runtime.step_in_training(self._resources.folder) if child.role in TRAINERS else None

    def _restart(self, child: Child, verdict: str) -> None:
        pause = backoff_seconds(child.incarnation)
        self._view.log(f"restarting {child.name} in {pause:g} s")
        self._tell(child, verdict, restarting=True)
        self._restarts_due[child.name] = (self._time.now() + pause, child.incarnation + 1)

    def _start_due(self) -> None:
        if self._stopping or self._ended is not None or self._end is not None:
            self._restarts_due.clear()
        now = self._time.now()
        for name, (due, incarnation) in list(self._restarts_due.items()):
            if due <= now and self._can_start(self._table[name]):
                del self._restarts_due[name]
                self._start(name, incarnation)

    def _can_start(self, entry: ProcessEntry) -> bool:
        """A process of a host that is away waits for it."""
        fleet = self._fleet
        return fleet is None or not fleet.has(entry.host) or fleet.is_there(entry.host)

    def _give_up(self, child: Child, end: End) -> None:
        self._end = self._end or end
        self._view.log(f"{child.name} does not come back; ending the run")
        self._tell(child, end.verdict, restarting=False)
        if child.role in IRREPLACEABLE:
            self._stopping = False
            return
        self._end_early(self._end)

    def _end_early(self, end: End) -> None:
        """Let the trainer finish its step and save; then the run ends so."""
        self._end = end
        self._stop(end.verdict)
        # A step may take as long as the run allows for anything to move.
        self._deadline = self._time.now() + self._record.topology.run.no_progress_seconds

    def _tell(self, child: Child, verdict: str, *, restarting: bool) -> None:
        self._resources.dealer.send(
            ActorExited(
                actor=child.name,
                incarnation=child.incarnation,
                verdict=verdict,
                restarting=restarting,
            )
        )
