"""The grader actor: scores responses against gold answers, under a time limit that nothing can talk
its way out of.

Consumes `GradeTask`s, one credit each. Produces one `GradeResult` per task. Waits for the
controller's messages and for its worker process. Unblocked by either, and by the time limit of a
response. Most responses are decided here, by text and exact numbers; only what needs real
mathematics goes to the worker. Progress counts graded responses. Heartbeats list a task from its
arrival until its answer is sent.
"""

from __future__ import annotations

import time
from collections import Counter, deque

from msgspec import Struct

from zppo.config.rewards import REWARD, REWARD_AND_TEACHER, rule_of
from zppo.errors import UserError
from zppo.grading import quick_grade
from zppo.records.timeline import GRADE, START, WAIT
from zppo_actors.grading.handle import GradeWorker, with_answer, worker_command
from zppo_actors.grading.own import OwnOrder
from zppo_actors.membership import LONGEST_REASON, Leave, Membership
from zppo_actors.process import ActorContext
from zppo_protocol.messages import (
    Credits,
    Forgotten,
    GradeResult,
    GradeTask,
    Heartbeat,
    Hello,
    TaskFailed,
)
from zppo_protocol.sockets import Dealer
from zppo_protocol.values import TIMED_OUT, Grade

CAPACITY = 8
"""Tasks on the way or waiting here: enough that the next one is at hand, few enough to share work
among graders."""
BUSY_WAIT = 0.05
"""Longest wait for the worker, in seconds, before the controller is heard again."""


def main(context: ActorContext) -> int:
    """Grade until told to leave; returns the exit code."""
    topology = context.topology
    entries = topology.data.reward
    own = OwnOrder(entries=entries, identities=context.extensions) if entries else None
    command = worker_command(topology.data.train, topology.data.heldout, rewards=own)
    worker = GradeWorker(topology.actors.grader.timeout_seconds, command)
    dealer = Dealer(context.credentials, context.limits)
    try:
        return GraderActor(context, dealer, worker).run()
    finally:
        worker.close()
        dealer.close()


class _TaskInHand(Struct):
    """A task and the grades of its first responses."""

    task: GradeTask
    grades: list[Grade]


class GraderActor:
    """The synchronous loop of the actor around one dealer and one worker."""

    def __init__(self, context: ActorContext, dealer: Dealer, worker: GradeWorker) -> None:
        self._context = context
        self._dealer = dealer
        self._worker = worker
        self._in_hand: deque[_TaskInHand] = deque()
        self._membership = Membership(context.topology.transport.heartbeat_seconds)
        self._counts: Counter[str] = Counter()
        self._owed = 0
        """Credits of answered tasks that have not gone back yet."""
        self._open = False
        self._timeline = context.timeline
        self._since = self._timeline.began
        """when the grader began what it does: start, wait or grade"""

    def run(self) -> int:
        """Greet, then grade until told to leave; returns the exit code."""
        self._dealer.send(self._hello())
        try:
            while True:
                self._beat()
                self._listen()
                self._work()
        except Leave as leave:
            self._dealer.send(leave.goodbye())
            return leave.exit_code

    def _hello(self) -> Hello:
        return self._context.hello("grader", CAPACITY)

    def _beat(self) -> None:
        if not self._membership.due(time.monotonic()):
            return
        stats = {
            "graded_total": float(self._counts["graded"]),
            "timeouts_total": float(self._counts["timed out"]),
            "failed_total": float(self._counts["failed"]),
            "waiting": float(len(self._in_hand)),
        }
        tasks = [one.task.task_id for one in self._in_hand]
        self._dealer.send(Heartbeat(progress=self._counts["graded"], tasks=tasks, stats=stats))

    def _listen(self) -> None:
        """Take one message; wait for it only when there is nothing else to do."""
        idle = self._open and not self._in_hand
        message = self._dealer.receive(self._membership.rest(time.monotonic()) if idle else 0.0)
        if isinstance(message, GradeTask):
            if not self._in_hand:
                self._turn(WAIT)
            self._in_hand.append(_TaskInHand(message, []))
        elif isinstance(message, Forgotten):
            if self._membership.greets_again(time.monotonic()):
                self._dealer.send(self._hello())
        elif message is not None:
            if self._membership.begins_anew(message) and self._open:
                self._grant(CAPACITY - len(self._in_hand))
            self._membership.obey(message)

    def _work(self) -> None:
        """Grade one response further: at once where that is safe, else in the worker, a short wait
        at a time."""
        if self._worker.ready and self._in_hand:
            self._begin(self._in_hand[0])
        elif not self._worker.ready:
            grades = self._worker.poll(BUSY_WAIT)
            if grades is not None:
                self._record(self._in_hand[0], grades)
        if self._worker.ready and not self._open:
            self._open = True
            self._turn(START)
            self._grant(CAPACITY)

    def _begin(self, current: _TaskInHand) -> None:
        """Grade the next response of the task, or hand it to the worker; all of them to one with a
        reward of whole groups."""
        task, index = current.task, len(current.grades)
        if index == len(task.responses):
            self._answer(GradeResult(task_id=task.task_id, grades=current.grades))
            return
        if rule_of(task.grader)[0] in (REWARD, REWARD_AND_TEACHER):
            chosen = task.responses if self._worker.whole_groups else task.responses[index:][:1]
            self._worker.submit(chosen, task.gold, task.grader, task.question, task.row)
            return
        response = task.responses[index]
        try:
            grade = quick_grade(response, task.gold, task.grader)
        except UserError as error:
            self._answer(
                TaskFailed(
                    task_id=task.task_id, reason=str(error)[:LONGEST_REASON], retryable=False
                )
            )
            return
        if grade is None:
            self._worker.submit([response], task.gold, task.grader)
        else:
            self._record(current, [grade])

    def _record(self, current: _TaskInHand, grades: list[Grade]) -> None:
        for grade in grades:
            current.grades.append(with_answer(grade, current.task.responses[len(current.grades)]))
            self._counts["graded"] += 1
            self._counts["timed out"] += grade.note == TIMED_OUT
            self._counts["failed"] += grade.failed
        if len(current.grades) == len(current.task.responses):
            self._answer(GradeResult(task_id=current.task.task_id, grades=current.grades))

    def _answer(self, message: GradeResult | TaskFailed) -> None:
        """Close the first task: send its answer. Credits go back several at once, early enough that
        the next task is always at hand."""
        self._dealer.send(message)
        task = self._in_hand.popleft().task
        self._timeline.task(GRADE, task.task_id, self._since, len(task.responses))
        self._since = self._timeline.now()
        self._owed += 1
        if self._owed >= CAPACITY // 2 or not self._in_hand:
            self._grant(self._owed)

    def _grant(self, count: int) -> None:
        self._owed = 0
        if count > 0:
            self._dealer.send(Credits(count=count))

    def _turn(self, kind: str) -> None:
        """Put on the timeline what has just ended; the next thing begins now."""
        now = self._timeline.now()
        self._timeline.span(kind, self._since, now)
        self._since = now
