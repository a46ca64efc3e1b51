"""The process that really grades: reads requests from stdin, writes one grade for each to stdout.

It exists to be killed. Mathematics from a model may run for ever, inside C code and without giving
Python a chance to look at the clock, so the limits are the kernel's: a timer of processor time
whose default action is death ends this process, and so does an alarm if it sleeps instead, even if
nobody is left to do so. Processor time is what counts, so that a busy or frozen machine makes no
right answer wrong. Started as `python -m zppo_actors.grading.worker`.

Frames, both ways: a 4-byte little-endian length, then that many bytes of msgpack (`GradeRequest`,
`Grade`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
from typing import BinaryIO

import msgspec
from msgspec import Struct

from zppo.grading import grade
from zppo.grading.reasoning_gym_tasks import task_names
from zppo.signals import die_with_parent
from zppo_protocol.values import Grade

HEADER = struct.Struct("<I")
MAX_FRAME = 64 * 2**20
MAX_MEMORY = 4 * 2**30
"""Bytes of address space; 9^9^9^9 asks for more than any machine has."""
PROCEDURAL = "--procedural"
"""Loads the scorers of procedural tasks, seconds of work, before the first time limit runs."""
WALL_FACTOR = 6.0
"""How many times the limit of processor time may pass on the clock."""
ALARM_SLACK = 1.0
"""Seconds by which the alarm comes after the grader actor has given up."""


class GradeRequest(Struct, frozen=True, kw_only=True):
    """One response to grade by rule `grader`, within `seconds` of processor time."""

    response: str
    gold: str
    grader: str
    seconds: float


WARM_UP = GradeRequest(response=r"\boxed{(x+1)^2}", gold="x^2+2x+1", grader="math", seconds=60.0)
"""Loads everything a grade needs, so that no real response pays for it."""


def pack(value: Struct) -> bytes:
    """One frame."""
    body = msgspec.msgpack.encode(value)
    return HEADER.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """The body of the next frame, or None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes; at most {MAX_FRAME} are taken")
    body = stream.read(size)
    return body if len(body) == size else None


def main(arguments: list[str]) -> int:
    """Answer requests until stdin ends; with PROCEDURAL among the arguments, be ready for
    procedural tasks too."""
    die_with_parent(signal.SIGKILL)
    requests, replies = _private_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    _limit_memory()
    if PROCEDURAL in arguments:
        task_names("grade worker")
    while (body := read_frame(requests)) is not None:
        request = msgspec.msgpack.decode(body, type=GradeRequest)
        _limit_time(request.seconds)
        reply = _grade(request)
        _limit_time(None)
        replies.write(pack(reply))
        replies.flush()
    return 0


def _grade(request: GradeRequest) -> Grade:
    try:
        return grade(request.response, request.gold, request.grader)
    except (
        Exception
    ) as error:  # whatever a grader trips over, the response is not shown to be right
        return Grade(reward=0.0, note=f"the grader failed: {type(error).__name__}: {error}"[:500])


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Stdin and stdout for frames only; whatever a library prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return requests, replies


def _limit_time(seconds: float | None) -> None:
    """From now on at most so much processor time, user and system, and WALL_FACTOR times as much on
    the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds or 0.0)
    signal.setitimer(
        signal.ITIMER_REAL, 0.0 if seconds is None else WALL_FACTOR * seconds + ALARM_SLACK
    )


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(ValueError, OSError):  # a lower limit set from outside stays
            resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
