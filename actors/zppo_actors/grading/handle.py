"""The grader actor's handle on its worker process: submit one response, poll for its grade, kill
what hangs.

The invariant: after `submit`, `poll` hands back exactly one grade, whatever the worker does. A
response has a limit of processor time; the kernel ends a worker that passes it, and the response
earns nothing. A worker that dies otherwise, or that has used less when WALL_FACTOR times the limit
has passed on the clock (it was frozen, or the machine is busy), is replaced and the response tried
once more. Nothing but `grade` blocks for longer than it is told to.

With rewards of the user's (`data.reward`) a request may hold all responses of a group, whose limits
add up; a response whose reward is ended is left out, not wrong, and one that sleeps is not tried
again. What such a worker prints is read here, and only its beginning is kept. The worker leads a
process group of its own, so that what it has started dies with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

import msgspec
from msgspec import structs

from zppo.config.topology import is_procedural
from zppo.errors import UserError
from zppo.grading import parse_answer, quick_grade
from zppo_actors.grading.own import OwnOrder
from zppo_actors.grading.worker import (
    HEADER,
    PROCEDURAL,
    REWARDS,
    WALL_FACTOR,
    WARM_UP,
    WHOLE,
    GradeRequest,
    pack,
)
from zppo_protocol.values import TIMED_OUT, Grade

COMMAND = (sys.executable, "-P", "-m", "zppo_actors.grading.worker")
STARVED = "timed out with little processor time used"
POLL_SECONDS = 1.0
CRASHED = "the grade worker crashed"
MAX_PRINTED, MOST_READ = 4096, 2**20
"""Bytes of what a worker prints for a request that are logged, and that are read at once."""
MAX_FAILED_STARTS = 3
"""Workers in a row that may die before they are ready."""
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

_ENDED_BY = {-signal.SIGPROF: TIMED_OUT, -signal.SIGALRM: STARVED}
"""Exit code of a worker that one of its own limits has ended -> why."""

log = logging.getLogger("zppo.grader")


def worker_command(*sources: str | None, rewards: OwnOrder | None = None) -> list[str]:
    """The command of a worker that grades the questions of these sources (`data.train`,
    `data.heldout`), by these rewards."""
    procedural = any(source is not None and is_procedural(source) for source in sources)
    order = [REWARDS, msgspec.json.encode(rewards).decode()] if rewards is not None else []
    return [*COMMAND, *([PROCEDURAL] if procedural else []), *order]


def with_answer(grade: Grade, response: str) -> Grade:
    """A worker that was killed could not parse the answer; it still belongs in what is shown."""
    if not grade.note or grade.answer is not None:
        return grade
    return structs.replace(grade, answer=parse_answer(response))


class GradeWorker:
    """One worker process at a time, and at most one request in it."""

    def __init__(self, timeout_seconds: float, command: Sequence[str] = COMMAND) -> None:
        """Start the first worker; poll until `ready`. A response may take `timeout_seconds` of
        processor time."""
        self.timeout_seconds = timeout_seconds
        self._command = list(command)
        self._own = REWARDS in self._command
        self.whole_groups = False
        """Whether a reward wants all responses of a group in one request; known when first
        `ready`."""
        self._request: GradeRequest | None = None
        self._tries = 0
        self._failed_starts = 0
        self._start()

    @property
    def ready(self) -> bool:
        """Whether a response can be submitted."""
        return not self._warming and self._request is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(
        self, responses: list[str], gold: str, grader: str, question: str = "", row: str = ""
    ) -> None:
        """Hand over one response, or all of a group; only when `ready`."""
        if not self.ready:
            raise RuntimeError("the grade worker is busy")
        self._request = GradeRequest(
            responses=responses,
            gold=gold,
            grader=grader,
            seconds=self.timeout_seconds * len(responses),
            question=question,
            row=row,
        )
        self._tries = 0
        self._send(self._request)

    def grade(
        self, response: str, gold: str, grader: str, question: str = "", row: str = ""
    ) -> Grade:
        """Grade one response and wait for it."""
        quick = None if self._own else quick_grade(response, gold, grader)
        if quick is not None:
            return quick
        while not self.ready:
            self.poll(POLL_SECONDS)
        self.submit([response], gold, grader, question, row)
        grades = None
        while grades is None:
            grades = self.poll(POLL_SECONDS)
        return with_answer(grades[0], response)

    def poll(self, wait_seconds: float) -> list[Grade] | None:
        """Move on for at most `wait_seconds`; return the grades once they are known.

        Raises RuntimeError when a worker cannot even start, and UserError when it cannot load a
        reward.
        """
        left = self._deadline - time.monotonic()
        alive = self._exchange(max(0.0, min(wait_seconds, left)))
        reply = self._take_reply()
        if reply is not None:
            return self._finish(reply)
        if not alive:
            return self._replace(CRASHED)
        return self._replace(STARVED) if time.monotonic() >= self._deadline else None

    def close(self) -> None:
        """Kill the worker, with what it has started, and reap it. Safe to call twice."""
        if self._own and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if self._own else None,
            bufsize=0,
            env=os.environ | _ONE_THREAD,
            process_group=0 if self._own else None,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._printed = _Printed(self._process.stderr)
        self._received = b""
        self._warming = True
        self._send(WARM_UP)

    def _send(self, request: GradeRequest) -> None:
        self._unsent = pack(request)
        self._deadline = time.monotonic() + WALL_FACTOR * request.seconds

    def _exchange(self, wait_seconds: float) -> bool:
        """Write what can be written, read what is there; False once the worker has closed its
        end, or has ended while a process that it started holds it open."""
        writers = [self._requests] if self._unsent else []
        readers = [self._replies, *self._printed.readers]
        readable, writable, _ = select.select(readers, writers, [], wait_seconds)
        try:
            if writable:
                self._unsent = self._unsent[os.write(self._requests, self._unsent) :]
            self._printed.read()
            if self._own and self._replies not in readable:
                return not self._has_ended()
            if self._replies in readable:
                data = os.read(self._replies, 2**16)
                self._received += data
                return bool(data)
        except BrokenPipeError:
            return False
        return True

    def _has_ended(self) -> bool:
        """Looked at without reaping, so that its process group keeps its number for `close`."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, look) is not None

    def _take_reply(self) -> list[Grade] | None:
        if len(self._received) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self._received)
        body = self._received[HEADER.size : HEADER.size + size]
        if len(body) < size:
            return None
        self._received = b""
        return msgspec.msgpack.decode(body, type=list[Grade])

    def _finish(self, reply: list[Grade]) -> list[Grade] | None:
        """Close the books on a reply; the one to the warm-up opens the worker for the response that
        waits, if any."""
        self._printed.log()
        if self._warming:
            if reply[0].failed:
                raise UserError(reply[0].note)
            self.whole_groups = reply[0].note == WHOLE
            self._warming = False
            self._failed_starts = 0
            self._deadline = float("inf")
            if self._request is not None:
                self._send(self._request)
            return None
        self._request = None
        self._deadline = float("inf")
        return reply

    def _replace(self, reason: str) -> list[Grade] | None:
        """Kill the worker and start the next; the request gets its second try or its last word."""
        self._printed.log()
        self.close()
        reason = _ENDED_BY.get(self._process.returncode, reason)
        log.warning("worker %d: %s (exit code %s)", self.pid, reason, self._process.returncode)
        request, over = self._request, self._count_failure(reason)
        if over:
            self._request = None
        self._start()
        if request is None or not over:
            return None
        note = TIMED_OUT if reason == STARVED else reason
        grade = Grade(reward=0.0, note=note, failed=self._own, undecided=not self._own)
        return [grade] * len(request.responses)

    def _count_failure(self, reason: str) -> bool:
        """Whether the failure was the last word on the response; a worker that never got to it does
        not count."""
        if self._warming:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"the grade worker cannot start: {reason} (exit code "
                    f"{self._process.returncode})"
                )
            return False
        self._tries += 1
        final = (TIMED_OUT, STARVED) if self._own else (TIMED_OUT,)
        return self._request is not None and (reason in final or self._tries > 1)


class _Printed:
    """What a worker with code of the user's prints: read to its end, so that it never waits, and
    kept as far as a log should go."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        self.readers = [] if pipe is None else [pipe.fileno()]
        self._kept, self._bytes = b"", 0
        for reader in self.readers:
            os.set_blocking(reader, False)

    def read(self) -> None:
        """Take what has come, a bounded part of it at a time."""
        for reader in list(self.readers):
            try:
                data = os.read(reader, MOST_READ)
            except BlockingIOError:
                continue
            if not data:
                self.readers.remove(reader)
            self._bytes += len(data)
            self._kept = (self._kept + data)[:MAX_PRINTED]

    def log(self) -> None:
        """Log the beginning of what was printed for one request."""
        self.read()
        if self._kept:
            text = self._kept.decode(errors="replace").rstrip()
            more = f" (the first of {self._bytes} bytes)" if self._bytes > MAX_PRINTED else ""
            log.info("a reward printed%s: %s", more, text)
        self._kept, self._bytes = b"", 0
