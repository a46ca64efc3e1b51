"""The grader actor: scores responses against gold answers, under a time limit that nothing can talk
its way out of.

Consumes `GradeTask`s, one credit each. Produces one `GradeResult` per task. Waits for the
controller's messages and for its worker process. Unblocked by either, and by the time limit of a
response. Most responses are decided here, by text and exact numbers; only what needs real
mathematics goes to the worker. Progress counts graded responses. Heartbeats list a task from its
arrival until its answer is sent.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque

from msgspec import Struct

from zppo.errors import UserError
from zppo.grading import parse_answer, quick_grade
from zppo_actors.grading.handle import TIMED_OUT, GradeWorker, worker_command
from zppo_actors.process import ActorContext
from zppo_protocol.limits import limits_for
from zppo_protocol.messages import (
    AnyMessage,
    Credits,
    Goodbye,
    GradeResult,
    GradeTask,
    Heartbeat,
    Rejected,
    Shutdown,
    TaskFailed,
    Welcome,
)
from zppo_protocol.sockets import Dealer
from zppo_protocol.values import Grade

CAPACITY = 8
"""Tasks on the way or waiting here: enough that the next one is at hand, few enough to share work
among graders."""
BUSY_WAIT = 0.05
"""Longest wait for the worker, in seconds, before the controller is heard again."""

log = logging.getLogger("zppo.grader")


def main(context: ActorContext) -> int:
    """Grade until told to leave; returns the exit code."""
    topology = context.topology
    command = worker_command(topology.data.train, topology.data.heldout)
    worker = GradeWorker(topology.actors.grader.timeout_seconds, command)
    dealer = Dealer(context.address, context.actor, limits_for(topology.transport.max_message_mib))
    try:
        return GraderActor(context, dealer, worker).run()
    finally:
        worker.close()
        dealer.close()


class _Job(Struct):
    """A task and the grades of its first responses."""

    task: GradeTask
    grades: list[Grade]


class GraderActor:
    """The synchronous loop of the actor around one dealer and one worker."""

    def __init__(self, context: ActorContext, dealer: Dealer, worker: GradeWorker) -> None:
        self._context = context
        self._dealer = dealer
        self._worker = worker
        self._jobs: deque[_Job] = deque()
        self._heartbeat_seconds = context.topology.transport.heartbeat_seconds
        self._next_beat = 0.0
        self._counts: Counter[str] = Counter()
        self._open = False
        self._exit_code: int | None = None

    def run(self) -> int:
        self._greet()
        while self._exit_code is None:
            self._beat()
            self._listen()
            self._work()
        self._dealer.send(Goodbye())
        return self._exit_code

    def _greet(self) -> None:
        self._dealer.send(self._context.hello("grader", CAPACITY))

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + self._heartbeat_seconds
        stats = {
            "graded_total": float(self._counts["graded"]),
            "timeouts_total": float(self._counts["timed out"]),
            "waiting": float(len(self._jobs)),
        }
        tasks = [job.task.task_id for job in self._jobs]
        self._dealer.send(Heartbeat(progress=self._counts["graded"], tasks=tasks, stats=stats))

    def _listen(self) -> None:
        """Take one message; wait for it only when there is nothing else to do."""
        idle = self._open and not self._jobs
        message = self._dealer.receive(
            max(0.0, self._next_beat - time.monotonic()) if idle else 0.0
        )
        if message is not None:
            self._handle(message)

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case GradeTask():
                self._jobs.append(_Job(message, []))
            case Welcome():
                self._heartbeat_seconds = message.heartbeat_seconds
            case Shutdown():
                self._exit_code = 0
            case Rejected():
                log.error("the controller refuses to work with this process: %s", message.reason)
                self._exit_code = 1
            case _:
                log.warning("ignored a %s, which no grader expects", type(message).__name__)

    def _work(self) -> None:
        """Grade one response further: at once where that is safe, else in the worker, a short wait
        at a time."""
        if self._worker.ready and self._jobs:
            self._begin(self._jobs[0])
        elif not self._worker.ready:
            grade = self._worker.poll(BUSY_WAIT)
            if grade is not None:
                self._record(self._jobs[0], grade)
        if self._worker.ready and not self._open:
            self._open = True
            self._dealer.send(Credits(count=CAPACITY))

    def _begin(self, job: _Job) -> None:
        """Grade the next response of the job, or hand it to the worker."""
        task, index = job.task, len(job.grades)
        if index == len(task.responses):
            self._answer(GradeResult(task_id=task.task_id, grades=job.grades))
            return
        response = task.responses[index]
        try:
            grade = quick_grade(response, task.gold, task.grader)
        except UserError as error:
            self._answer(TaskFailed(task_id=task.task_id, reason=str(error), retryable=False))
            return
        if grade is None:
            self._worker.submit(response, task.gold, task.grader)
        else:
            self._record(job, grade)

    def _record(self, job: _Job, grade: Grade) -> None:
        if grade.note and grade.answer is None:
            # A worker that was killed could not parse it; the answer still belongs in NCQ's list of
            # wrong ones.
            grade = Grade(
                reward=grade.reward,
                answer=parse_answer(job.task.responses[len(job.grades)]),
                note=grade.note,
            )
        job.grades.append(grade)
        self._counts["graded"] += 1
        self._counts["timed out"] += grade.note == TIMED_OUT
        if len(job.grades) == len(job.task.responses):
            self._answer(GradeResult(task_id=job.task.task_id, grades=job.grades))

    def _answer(self, message: GradeResult | TaskFailed) -> None:
        """Close the first job: send its answer and give its credit back."""
        self._dealer.send(message)
        self._jobs.popleft()
        self._dealer.send(Credits(count=1))
