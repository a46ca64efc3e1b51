"""The process that really grades: reads requests from stdin, writes one grade for each to stdout.

It exists to be killed. Mathematics from a model may run for ever, inside C code and without giving
Python a chance to look at the clock, so the limits are the kernel's: a timer of processor time
whose default action is death ends this process, and so does an alarm if it sleeps instead, even if
nobody is left to do so. Processor time is what counts, so that a busy or frozen machine makes no
right answer wrong. Started as `python -m zppo_actors.grading.worker`.

A reward of the user's may fork: a copy of this process that comes back from it ends at once, so
that there is one reply to each request; the others die with the group that the handle kills.

Frames, both ways: a 4-byte little-endian length, then that many bytes of msgpack (`GradeRequest`,
a list of `Grade`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
from typing import BinaryIO

import msgspec
from msgspec import Struct, structs

from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, rule_of
from zppo.errors import UserError, words_of
from zppo.grading import grade
from zppo.grading.reasoning_gym_tasks import task_names
from zppo.signals import die_with_parent
from zppo_actors.grading.own import OwnRewards
from zppo_protocol.values import Grade

HEADER = struct.Struct("<I")
MAX_FRAME = 64 * 2**20
MAX_MEMORY = 4 * 2**30
"""Bytes of address space; 9^9^9^9 asks for more than any machine has."""
PROCEDURAL = "--procedural"
"""Loads the scorers of procedural tasks, seconds of work, before the first time limit runs."""
REWARDS = "--rewards"
"""Before an `OwnOrder` (JSON): the rewards of `data.reward`, loaded before the first request."""
WHOLE = "whole groups"
"""Note of the reply to the warm-up where a reward wants all responses of a group at once."""
MAX_SENTENCE = 4000
WALL_FACTOR = 6.0
"""How many times the limit of processor time may pass on the clock."""
ALARM_SLACK = 1.0
"""Seconds by which the alarm comes after the grader actor has given up."""


class GradeRequest(Struct, frozen=True, kw_only=True):
    """Responses to grade by rule `grader`, within `seconds` of processor time together."""

    responses: list[str]
    gold: str
    grader: str
    seconds: float
    question: str = ""
    row: str = ""


WARM_UP = GradeRequest(responses=[r"\boxed{(x+1)^2}"], gold="x^2+2x+1", grader="math", seconds=60.0)
"""Loads everything a grade needs, so that no real response pays for it."""


def pack(value: Struct | list[Grade]) -> bytes:
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
    procedural tasks too, and with REWARDS for the rewards of the order behind it."""
    die_with_parent(signal.SIGKILL)
    requests, replies = _private_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    _limit_memory()
    if PROCEDURAL in arguments:
        task_names("grade worker")
    own = _own_rewards(arguments)
    process = os.getpid()
    while (body := read_frame(requests)) is not None:
        request = msgspec.msgpack.decode(body, type=GradeRequest)
        _limit_time(request.seconds)
        reply = _graded(request, own)
        if os.getpid() != process:
            os._exit(0)
        _limit_time(None)
        replies.write(pack(reply))
        replies.flush()
    return 0


def _own_rewards(arguments: list[str]) -> OwnRewards | Grade | None:
    """What REWARDS orders; a grade that says why it cannot be had, for the reply to the warm-up."""
    if REWARDS not in arguments:
        return None
    try:
        return OwnRewards.of(arguments[arguments.index(REWARDS) + 1])
    except UserError as error:
        return Grade(reward=0.0, note=str(error)[:MAX_SENTENCE], failed=True)


def _graded(request: GradeRequest, own: OwnRewards | Grade | None) -> list[Grade]:
    if isinstance(own, Grade):
        return [own]
    rule, part = rule_of(request.grader)
    if own is None or rule not in (REWARD, REWARD_AND_TEACHER):
        grades = [_grade(text, request) for text in request.responses]
        whole = own is not None and own.whole and request == WARM_UP
        return [structs.replace(grades[0], note=WHOLE)] if whole else grades
    return own.grades(request.question, request.responses, request.row, request.gold, part)


def _grade(response: str, request: GradeRequest) -> Grade:
    try:
        return grade(response, request.gold, request.grader)
    except (
        Exception
    ) as error:  # whatever a grader trips over, the response is not shown to be right
        note = f"the grader failed: {type(error).__name__}: {words_of(error)}"[:500]
        return Grade(reward=0.0, note=note, undecided=True)


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
