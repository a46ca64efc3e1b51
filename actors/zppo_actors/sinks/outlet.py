"""One sink on a thread of its own, between a bounded queue and what may be slow, away or wrong.

Consumes calls of the controller (`put`, which never waits). Waits for the next call, or for the
sink. Is unblocked by: a call, or `end`. The invariant: nothing that a sink does raises in, or holds
up, the thread that feeds it. What does not fit into the queue is dropped and counted; what ends the
sink is kept in `problem`. The thread is a daemon, so one that hangs does not keep the process.

A sink with `once` is given a step at most once, over all attempts: the step is noted in
`delivered.json` before it is handed over.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec import Struct

from zppo.records.atomic_file import written_whole
from zppo_actors.sinks.base import Event, RunInfo, Sink

QUEUED = 1000
"""Calls that wait for a sink at most: hours of steps."""
LONGEST_PROBLEM = 300
DELIVERED = "delivered.json"

log = logging.getLogger("zppo.controller")


class Delivered(Struct, kw_only=True):
    """What a sink has been given so far: the next step and evaluation that it waits for. `identity`
    is that of a user's code."""

    id: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))
    steps: int = 0
    evaluations: int = 0
    identity: str = ""

    @classmethod
    def read(cls, folder: Path) -> Delivered:
        """As the last attempt left it. What cannot be read counts as nothing."""
        try:
            return msgspec.json.decode((folder / DELIVERED).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return cls()

    def write(self, folder: Path) -> None:
        with written_whole(folder / DELIVERED) as file:
            file.write(msgspec.json.encode(self))


class Step(NamedTuple):
    step: int
    metrics: Mapping[str, float]


class Evaluation(NamedTuple):
    step: int
    metrics: Mapping[str, float]


Call: TypeAlias = Step | Evaluation | Event


class Outlet:
    """`make` gives the sink and is called on its thread, as importing its package may take long.
    `missed` is what an earlier attempt may not have handed over, oldest first."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Sink],
        run: RunInfo,
        missed: Callable[[], Iterable[Call]] = tuple,
        identity: str = "",
    ) -> None:
        self.name = name
        self.dropped = 0
        self.problem: str | None = None
        self.renewed = False
        """Whether the code of a user's sink is not what it was in an earlier attempt."""
        self._run, self._identity = run, identity
        self._make, self._missed = make, missed
        self._delivered = Delivered()
        self._waiting: deque[Call] = deque()
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"sink {name}")
        self._thread.start()

    def put(self, call: Call) -> None:
        """Hand over a call; it is dropped if the sink has failed or has too many already."""
        with self._changed:
            if self.problem is not None:
                return
            if len(self._waiting) >= QUEUED:
                self.dropped += 1
                return
            self._waiting.append(call)
            self._changed.notify()

    def end(self) -> None:
        """Nothing more will come; the sink closes when it has taken what waits."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def wait(self, seconds: float) -> int:
        """Wait for the sink to close; how many calls it has still not taken (1 at least, if it has
        not closed)."""
        self._thread.join(seconds)
        return max(1, len(self._waiting)) if self._thread.is_alive() else 0

    # ---- on its own thread -----------------------------------------------------------------------

    def _work(self) -> None:
        sink: Sink | None = None
        try:
            sink = self._make()
            once = getattr(sink, "once", True)
            if once or self._identity:
                self._recall()
            sink.open(msgspec.structs.replace(self._run, id=self._delivered.id))
            for call in self._calls(once=once):
                self._hand_over(sink, call)
            sink.close()
        except BaseException as error:  # also SystemExit: it is this sink that ends
            said = str(error).strip().partition("\n")[0]
            self.problem = f"{type(error).__name__}: {said}"[:LONGEST_PROBLEM]
            log.info("where the sink %s failed:", self.name, exc_info=error)
            with self._changed:
                self._waiting.clear()
            if sink is not None:
                with contextlib.suppress(BaseException):
                    sink.close()

    def _recall(self) -> None:
        """Go on where the last attempt was."""
        folder = self._run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._delivered = Delivered.read(folder)
        self.renewed = self._delivered.identity not in ("", self._identity)
        self._delivered.identity = self._identity
        self._delivered.write(folder)

    def _calls(self, *, once: bool) -> Iterator[Call]:
        """What is to be handed over; with `once` also what is missing from before, and nothing a
        second time."""
        calls = chain(self._missed(), self._arriving()) if once else self._arriving()
        return (call for call in calls if not once or self._is_new(call))

    def _arriving(self) -> Iterator[Call]:
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if not self._waiting:
                    return
                call = self._waiting.popleft()
            yield call

    def _is_new(self, call: Call) -> bool:
        """Note the call as handed over, unless it was before."""
        match call:
            case Step() if call.step >= self._delivered.steps:
                self._delivered.steps = call.step + 1
            case Evaluation() if call.step >= self._delivered.evaluations:
                self._delivered.evaluations = call.step + 1
            case Event():
                return True
            case _:
                return False
        self._delivered.write(self._run.folder)
        return True

    @staticmethod
    def _hand_over(sink: Sink, call: Call) -> None:
        if isinstance(call, Event):
            sink.event(call)
        else:
            sink.step(call.step, call.metrics)
