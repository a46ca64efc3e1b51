"""The host agent: it runs the processes of a further host as the supervisor wants them, until the
run is over.

Consumes `HostWelcome`, `HostOrders`, `Rejected` and `Shutdown`. Produces `HostHello`, `HostReport`
and `Goodbye`. Waits for the next message, at most `TICK_SECONDS`. Invariant: processes of the run
live here only while the supervisor is heard: after a lease without a word of it, all are ended, and
the agent tries to be heard again, for as long as it would wait for a run to begin.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec import structs

from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError
from zppo.signals import Interrupts
from zppo_actors import timeline
from zppo_actors.hosts.attempt import HostAttempt
from zppo_actors.own_time import OwnTime
from zppo_actors.supervisor.fleet import GREET_ANEW, versions
from zppo_protocol.errors import AccessError
from zppo_protocol.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Goodbye,
    HostHello,
    HostOrders,
    HostReport,
    HostWelcome,
    Rejected,
    Shutdown,
)

TICK_SECONDS = 0.1
GREET_SECONDS = 1.0
MOST_GREETINGS = 10
"""Unanswered ones on one line."""

log = logging.getLogger("zppo.host")


class Line(Protocol):
    """What the agent needs of its dealer."""

    def send(self, message: AnyMessage) -> None: ...

    def receive(self, timeout_s: float) -> AnyMessage | None: ...

    def close(self) -> None: ...


class Leave(Exception):
    """The run is over, or refuses this host; carries the sentence for the one who started it."""

    def __init__(self, exit_code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code, self.sentence = exit_code, sentence


CheckFolders = Callable[[Mapping[str, str]], None]
"""Raises UserError for a folder that is missing on this host, or differs."""


class Agent:
    """`wait_seconds`: how long to wait for the run to begin, and for a supervisor that is not heard
    any more."""

    def __init__(
        self,
        host: str,
        connect: Callable[[], Line],
        wait_seconds: float,
        interrupts: Interrupts,
        check_folders: CheckFolders,
    ) -> None:
        self._host, self._connect, self._wait_seconds = host, connect, wait_seconds
        self._interrupts, self._check_folders = interrupts, check_folders
        self._line, self._greetings = connect(), 0
        self._life, self._boot = "", timeline.boot()
        self._welcome: HostWelcome | None = None
        self._attempt: HostAttempt | None = None
        self._received: dict[str, tuple[int, int]] = {}
        self._answered = False
        self._refusal: AccessError | None = None
        self._time = OwnTime()
        self._heard = self._time.now()
        self._due = float("-inf")

    def run(self) -> int:
        """Serve until the run is over. Returns its exit code: 0 when the run has dismissed this
        host, 1 when nothing was heard for `wait_seconds`, 130 when interrupted. Raises UserError
        where this host cannot take part, or its key was not let in for as long."""
        try:
            while not self._interrupts.count:
                self._turn()
            self._say_goodbye("it was stopped there")
            raise Leave(EXIT_INTERRUPTED, "stopped")
        except Leave as leave:
            print(leave.sentence, file=sys.stderr if leave.exit_code else sys.stdout, flush=True)
            return leave.exit_code
        except BaseException as error:
            self._say_goodbye(str(error)[:2000])
            raise
        finally:
            self._end_attempt()
            self._line.close()

    def _say_goodbye(self, reason: str) -> None:
        with contextlib.suppress(AccessError, TimeoutError):  # nobody is there to be told
            self._line.send(Goodbye(reason=reason))

    def _turn(self) -> None:
        try:
            self._converse()
        except AccessError as refusal:
            self._be_refused(refusal)

    def _converse(self) -> None:
        message = self._line.receive(TICK_SECONDS)
        while message is not None:
            self._hear(message)
            message = self._line.receive(0.0)
        now = self._time.now()
        self._watch(now)
        if now >= self._due or (self._attempt is not None and self._attempt.has_news):
            self._speak(now)

    def _watch(self, now: float) -> None:
        """See to it that nothing runs here for a supervisor that is gone."""
        silent = now - self._heard
        if self._welcome is not None and silent > self._welcome.lease_seconds:
            log.warning("nothing was heard of the run for %g s; its processes end", silent)
            self._begin_anew()
        if silent > self._wait_seconds:
            if self._refusal is not None:
                raise UserError(str(self._refusal))
            sentence = f"the run was not heard for {self._wait_seconds:g} s; it is not there"
            raise Leave(EXIT_FAILED, f"{self._host}: {sentence}")

    def _be_refused(self, refusal: AccessError) -> None:
        """The key may be that of a run that was killed, whose place the next has taken and whose
        file it is about to replace: the next line reads it anew."""
        if str(refusal) != str(self._refusal):
            log.warning("%s; waiting for another key file or controller", refusal)
        self._refusal = refusal
        self._begin_anew()
        time.sleep(GREET_SECONDS)
        self._take_new_line()
        self._watch(self._time.now())

    def _speak(self, now: float) -> None:
        if self._welcome is None:
            self._due = now + GREET_SECONDS
            self._greet()
            return
        self._due = now + self._welcome.beat_seconds
        if self._attempt is None:
            self._report(HostReport(attempt="", actors=[], parts=[]))
            return
        # While the line is cut, what is sent piles up: files go once, until they are answered.
        files = self._answered or self._attempt.has_news
        self._answered = False
        self._report(self._attempt.report(self._received, files=files))

    def _report(self, report: HostReport) -> None:
        self._line.send(structs.replace(report, boot=self._boot, clock=time.monotonic()))

    def _greet(self) -> None:
        if self._greetings >= MOST_GREETINGS:
            # They wait in the line's queue; a new line also leaves behind what is half open.
            self._take_new_line()
        self._greetings += 1
        self._life = self._life or secrets.token_hex(8)
        self._line.send(
            HostHello(
                protocol_version=PROTOCOL_VERSION,
                host=self._host,
                life=self._life,
                versions=versions(),
            )
        )

    def _take_new_line(self) -> None:
        try:
            line = self._connect()
        except AccessError as error:  # of the file, not of who has read it
            raise UserError(str(error)) from None
        self._line.close()
        self._line, self._greetings = line, 0

    def _hear(self, message: AnyMessage) -> None:
        self._heard, self._refusal = self._time.now(), None
        match message:
            case HostWelcome() if self._welcome is None:
                self._check_folders(message.folders)
                self._welcome, self._heard = message, self._time.now()
                self._due = float("-inf")
                log.info("taken by the run")
            case HostOrders() if self._welcome is not None:
                self._obey(message)
            case Rejected() if message.reason == GREET_ANEW:
                self._begin_anew()
            case Rejected():
                raise UserError(message.reason)
            case Shutdown():
                raise Leave(0, f"{self._host}: {message.reason}")

    def _obey(self, orders: HostOrders) -> None:
        if self._attempt is not None and self._attempt.run_id != orders.attempt:
            for report in self._attempt.last_reports(orders.received):
                self._report(report)
            self._end_attempt()
        self._received, self._answered = orders.received, True
        if self._attempt is None and orders.attempt and orders.record:
            self._attempt = HostAttempt(self._host, orders)
        if self._attempt is not None:
            self._attempt.obey(orders)
        self._due = float("-inf") if self._attempt is None else self._due

    def _begin_anew(self) -> None:
        """Neither side counts on what the other knew."""
        self._end_attempt()
        self._welcome, self._life, self._due = None, "", float("-inf")
        self._greetings = MOST_GREETINGS

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
