"""The grader actor's handle on its worker process: submit one response, poll for its grade, kill
what hangs.

The invariant: after `submit`, `poll` hands back exactly one grade, whatever the worker does. A
response has a limit of processor time; the kernel ends a worker that passes it, and the response
earns nothing. A worker that dies otherwise, or that has used less when WALL_FACTOR times the limit
has passed on the clock (it was frozen, or the machine is busy), is replaced and the response tried
once more. Nothing but `grade` blocks for longer than it is told to.
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

import msgspec

from zppo.config.topology import is_procedural
from zppo.grading import parse_answer, quick_grade
from zppo_actors.grading.worker import HEADER, PROCEDURAL, WALL_FACTOR, WARM_UP, GradeRequest, pack
from zppo_protocol.values import TIMED_OUT, Grade

COMMAND = (sys.executable, "-P", "-m", "zppo_actors.grading.worker")
STARVED = "timed out with little processor time used"
POLL_SECONDS = 1.0
CRASHED = "the grade worker crashed"
MAX_FAILED_STARTS = 3
"""Workers in a row that may die before they are ready."""
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

_ENDED_BY = {-signal.SIGPROF: TIMED_OUT, -signal.SIGALRM: STARVED}
"""Exit code of a worker that one of its own limits has ended -> why."""

log = logging.getLogger("zppo.grader")


def worker_command(*sources: str | None) -> list[str]:
    """The command of a worker that grades the questions of these sources (`data.train`,
    `data.heldout`)."""
    procedural = any(source is not None and is_procedural(source) for source in sources)
    return [*COMMAND, *([PROCEDURAL] if procedural else [])]


def with_answer(grade: Grade, response: str) -> Grade:
    """A worker that was killed could not parse the answer; it still belongs in what is shown, and
    in NCQ's list."""
    if not grade.note or grade.answer is not None:
        return grade
    return Grade(reward=grade.reward, answer=parse_answer(response), note=grade.note)


class GradeWorker:
    """One worker process at a time, and at most one response in it."""

    def __init__(self, timeout_seconds: float, command: Sequence[str] = COMMAND) -> None:
        """Start the first worker; poll until `ready`. A response may take `timeout_seconds` of
        processor time."""
        self.timeout_seconds = timeout_seconds
        self._command = list(command)
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

    def submit(self, response: str, gold: str, grader: str) -> None:
        """Hand over one response; only when `ready`."""
        if not self.ready:
            raise RuntimeError("the grade worker is busy")
        self._request = GradeRequest(
            response=response, gold=gold, grader=grader, seconds=self.timeout_seconds
        )
        self._tries = 0
        self._send(self._request)

    def grade(self, response: str, gold: str, grader: str) -> Grade:
        """Grade one response and wait for it."""
        quick = quick_grade(response, gold, grader)
        if quick is not None:
            return quick
        while not self.ready:
            self.poll(POLL_SECONDS)
        self.submit(response, gold, grader)
        grade = None
        while grade is None:
            grade = self.poll(POLL_SECONDS)
        return with_answer(grade, response)

    def poll(self, wait_seconds: float) -> Grade | None:
        """Move on for at most `wait_seconds`; return the grade once it is known.

        Raises RuntimeError when a worker cannot even start.
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
        """Kill the worker and reap it. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | _ONE_THREAD,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._received = b""
        self._warming = True
        self._send(WARM_UP)

    def _send(self, request: GradeRequest) -> None:
        self._unsent = pack(request)
        self._deadline = time.monotonic() + WALL_FACTOR * request.seconds

    def _exchange(self, wait_seconds: float) -> bool:
        """Write what can be written, read what is there; False once the worker has closed its
        end."""
        writers = [self._requests] if self._unsent else []
        readable, writable, _ = select.select([self._replies], writers, [], wait_seconds)
        try:
            if writable:
                self._unsent = self._unsent[os.write(self._requests, self._unsent) :]
            if readable:
                data = os.read(self._replies, 2**16)
                self._received += data
                return bool(data)
        except BrokenPipeError:
            return False
        return True

    def _take_reply(self) -> Grade | None:
        if len(self._received) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self._received)
        body = self._received[HEADER.size : HEADER.size + size]
        if len(body) < size:
            return None
        self._received = b""
        return msgspec.msgpack.decode(body, type=Grade)

    def _finish(self, reply: Grade) -> Grade | None:
        """Close the books on a reply; the one to the warm-up opens the worker for the response that
        waits, if any."""
        if self._warming:
            self._warming = False
            self._failed_starts = 0
            self._deadline = float("inf")
            if self._request is not None:
                self._send(self._request)
            return None
        self._request = None
        self._deadline = float("inf")
        return reply

    def _replace(self, reason: str) -> Grade | None:
        """Kill the worker and start the next; the response gets its second try or its last word."""
        self.close()
        reason = _ENDED_BY.get(self._process.returncode, reason)
        log.warning("worker %d: %s (exit code %s)", self.pid, reason, self._process.returncode)
        over = self._count_failure(reason)
        if over:
            self._request = None
        self._start()
        return Grade(reward=0.0, note=TIMED_OUT if reason == STARVED else reason) if over else None

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
        return self._request is not None and (reason == TIMED_OUT or self._tries > 1)
