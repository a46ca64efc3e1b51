"""The grader actor and its worker as real processes: what hangs is killed, and every task is
answered once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from zppo.config.cluster import TransportConfig
from zppo.config.topology import (
    ActorsConfig,
    DataConfig,
    GraderConfig,
    StudentConfig,
    Topology,
)
from zppo.records import run_directory
from zppo_actors import runtime
from zppo_actors.grader import CAPACITY, GraderActor
from zppo_actors.grading.handle import CRASHED, STARVED, GradeWorker
from zppo_actors.grading.worker import WARM_UP, GradeRequest, pack, read_frame
from zppo_actors.membership import Membership
from zppo_actors.process import ActorContext
from zppo_protocol.messages import (
    AnyMessage,
    Credits,
    Forgotten,
    Goodbye,
    GradeResult,
    GradeTask,
    Heartbeat,
    Hello,
    Rejected,
    Shutdown,
    TaskFailed,
    Welcome,
)
from zppo_protocol.sockets import Router
from zppo_protocol.values import TIMED_OUT, Grade

pytestmark = pytest.mark.slow
PATIENCE = 600.0
HANGS = r"\boxed{9^{9^{9^{9}}}}"
NEEDS_MATHS = r"\boxed{(x+1)(x-1)}"

SCRIPTED = """
import os, signal, sys, time
from zppo.grading import GRADERS, Grader
from zppo_actors.grading import worker

def full(answer, gold):
    print("noise on stdout")
    if answer == "sleep":
        time.sleep(600)
    while answer == "burn":
        pass
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "raise":
        raise ValueError("no such answer")
    if answer == "eat":
        bytearray(8 * 2**30)
    return answer == gold

GRADERS["scripted"] = Grader(lambda answer, gold: None, full, bool)
sys.exit(worker.main([]))
"""
"""A worker whose grader does what the answer says."""


class Controller:
    """The other end of the actor under test."""

    def __init__(self, router: Router, process: subprocess.Popen[bytes], parent_fd: int) -> None:
        self.router = router
        self.process = process
        self.parent_fd = parent_fd
        self.heard: list[AnyMessage] = []

    def until(self, kind: type, count: int = 1) -> list[AnyMessage]:
        """Receive until `count` messages of `kind` were heard in all; return those."""
        while (
            len(found := [message for message in self.heard if isinstance(message, kind)]) < count
        ):
            received = self.router.receive(PATIENCE)
            assert received is not None, f"no {kind.__name__} came; heard {self.heard}"
            self.heard.append(received[1])
        return found

    def send(self, message: AnyMessage) -> None:
        assert self.router.send("grader-0", message)

    def ask(self, task_id: str, gold: str, *responses: str, grader: str = "math") -> None:
        self.send(GradeTask(task_id=task_id, gold=gold, responses=list(responses), grader=grader))

    def grades(self, task_id: str, count: int = 1) -> list[Grade]:
        results = [
            result for result in self.until(GradeResult, count) if isinstance(result, GradeResult)
        ]
        return next(result.grades for result in results if result.task_id == task_id)

    def credits(self, least: int) -> int:
        """Receive until at least so many were granted; how many were."""
        found = self.until(Credits)
        while (granted := sum(one.count for one in found if isinstance(one, Credits))) < least:
            found = self.until(Credits, len(found) + 1)
        return granted

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker


@pytest.fixture
def controller(
    tmp_path: Path, runtime_base: Path, request: pytest.FixtureRequest
) -> Iterator[Controller]:
    """A grader actor that has said Hello; the fixture's parameter is its time limit."""
    topology = Topology(
        data=DataConfig(train="train.jsonl"),
        student=StudentConfig(model="student"),
        actors=ActorsConfig(grader=GraderConfig(timeout_seconds=getattr(request, "param", 60.0))),
        transport=TransportConfig(heartbeat_seconds=0.05),
    )
    record = run_directory.create(tmp_path / "run", topology)
    folder, lock = runtime.create(record.run_id, runtime_base)
    router = Router(runtime.issue_keys(folder, {"grader-0": "grader"}))
    read_end, write_end = os.pipe()
    command = [sys.executable, "-P", "-m", "zppo_actors", "grader", "--run", str(tmp_path / "run")]
    command += [
        "--runtime",
        str(folder),
        "--actor",
        "grader-0",
        "--incarnation",
        "0",
        "--parent-fd",
        str(read_end),
    ]
    process = subprocess.Popen(command, pass_fds=(read_end,))
    os.close(read_end)
    controller = Controller(router, process, write_end)
    controller.until(Hello)
    yield controller
    if process.poll() is None:
        process.kill()
    process.wait(PATIENCE)
    os.close(
        controller.parent_fd
    )  # not `write_end`: a test may have put another descriptor in its place
    router.close()
    os.close(lock)
    runtime.remove(folder)


def gone(process: psutil.Process) -> bool:
    return not psutil.wait_procs([process], timeout=PATIENCE)[1]


def test_it_greets_grants_and_grades(controller: Controller) -> None:
    (hello,) = controller.until(Hello)
    assert isinstance(hello, Hello) and (hello.actor, hello.role, hello.capacity) == (
        "grader-0",
        "grader",
        CAPACITY,
    )
    controller.ask("t", "x^2-1", NEEDS_MATHS, r"\boxed{x}", "no box", r"\boxed{x^2-1}")
    grades = controller.grades("t")
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 1.0]
    assert [grade.answer for grade in grades] == ["(x+1)(x-1)", "x", None, "x^2-1"]
    credits = controller.until(Credits, 2)
    assert [message.count for message in credits if isinstance(message, Credits)] == [CAPACITY, 1]
    beats = len([message for message in controller.heard if isinstance(message, Heartbeat)])
    beat = controller.until(Heartbeat, beats + 1)[-1]
    assert isinstance(beat, Heartbeat) and beat.progress == 4 and beat.tasks == []


def test_a_grader_that_was_forgotten_greets_again_and_grants_anew(controller: Controller) -> None:
    assert controller.credits(CAPACITY) == CAPACITY
    controller.router.send("grader-0", Welcome(heartbeat_seconds=0.05))
    controller.router.send("grader-0", Forgotten())
    controller.until(Hello, 2)
    controller.router.send("grader-0", Welcome(heartbeat_seconds=0.05))
    assert controller.credits(2 * CAPACITY) == 2 * CAPACITY
    controller.ask("t", "7", r"\boxed{7}")
    assert [grade.reward for grade in controller.grades("t")] == [1.0]


def test_tasks_are_answered_in_order_whatever_becomes_of_them(controller: Controller) -> None:
    controller.ask("a", "7", r"\boxed{7}")
    controller.ask("b", "7")
    controller.ask("bad", "7", r"\boxed{7}", grader="maths")
    controller.ask("c", "7", NEEDS_MATHS)
    results = controller.until(GradeResult, 3)
    assert [result.task_id for result in results if isinstance(result, GradeResult)] == [
        "a",
        "b",
        "c",
    ]
    assert controller.grades("b") == []
    (failed,) = controller.until(TaskFailed)
    assert isinstance(failed, TaskFailed) and (failed.task_id, failed.retryable) == ("bad", False)
    assert failed.reason == "data.grader: unknown grader 'maths' (did you mean 'math'?)"
    assert controller.credits(CAPACITY + 4) == CAPACITY + 4


@pytest.mark.parametrize("controller", [1.0], indirect=True)
def test_what_hangs_is_killed_and_the_next_answer_is_right(controller: Controller) -> None:
    controller.ask("t", "x^2-1", HANGS, NEEDS_MATHS)
    grades = controller.grades("t")
    assert [(grade.reward, grade.note) for grade in grades] == [(0.0, TIMED_OUT), (1.0, "")]
    assert grades[0].answer == "9^{9^{9^{9}}}"
    beats = [
        beat for beat in controller.heard if isinstance(beat, Heartbeat) and beat.tasks == ["t"]
    ]
    assert len(beats) >= 2, "heartbeats must not wait for a response that hangs"


@pytest.mark.parametrize("controller", [2.0], indirect=True)
def test_a_killed_worker_is_replaced_and_the_task_answered_once(controller: Controller) -> None:
    controller.until(Credits)
    first = controller.worker()
    controller.ask("t", "x^2-1", HANGS, NEEDS_MATHS)
    first.kill()
    controller.ask("u", "7", r"\boxed{7}")
    grades = controller.grades("t", count=2)
    assert [grade.reward for grade in grades] == [0.0, 1.0]
    results = controller.until(GradeResult, 2)
    assert [result.task_id for result in results if isinstance(result, GradeResult)] == ["t", "u"]
    assert gone(first) and controller.worker().pid != first.pid


@pytest.mark.parametrize("controller", [1.0], indirect=True)
def test_heartbeats_list_queued_and_running_tasks_until_they_are_answered(
    controller: Controller,
) -> None:
    names = ["hanging", "next", "last"]
    for name in names:
        controller.ask(name, "x^2-1", HANGS if name == "hanging" else NEEDS_MATHS)
    controller.until(GradeResult, 3)
    beats = len([message for message in controller.heard if isinstance(message, Heartbeat)])
    controller.until(Heartbeat, beats + 1)
    assert any(
        isinstance(message, Heartbeat) and message.tasks == names for message in controller.heard
    )
    listed: list[str] = []
    for message in controller.heard:
        if isinstance(message, GradeResult):
            listed.remove(message.task_id)
        elif isinstance(message, Heartbeat):
            assert message.tasks[: len(listed)] == listed
            listed = message.tasks
    assert listed == []


class BeatsWhileItSends:
    """A dealer that lets a heartbeat go out just before each answer."""

    def __init__(self) -> None:
        self.incoming: list[AnyMessage] = []
        self.sent: list[AnyMessage] = []
        self.beat: Callable[[], None] = list

    def receive(self, timeout_s: float) -> AnyMessage | None:
        return self.incoming.pop(0) if self.incoming else None

    def send(self, message: AnyMessage) -> None:
        if isinstance(message, GradeResult | TaskFailed):
            self.beat()
        self.sent.append(message)


class Unused:
    """A worker that is ready and never needed."""

    ready = True


def test_a_task_leaves_the_heartbeats_only_after_its_answer() -> None:
    topology = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        transport=TransportConfig(heartbeat_seconds=0.001),
    )
    dealer = BeatsWhileItSends()
    context = ActorContext(Path(), Path(), "grader-0", "grader", 0, topology, "run", 0)
    actor = GraderActor(context, dealer, Unused())  # type: ignore[arg-type]

    def beat() -> None:
        actor._membership = Membership(0.0)  # a beat is due at any time
        actor._beat()

    dealer.beat = beat
    for name, grader in (("good", "math"), ("bad", "maths")):
        dealer.incoming.append(
            GradeTask(task_id=name, gold="7", responses=[r"\boxed{7}"], grader=grader)
        )
        actor._listen()
    while actor._in_hand:
        actor._work()
    beat()
    assert [message.tasks for message in dealer.sent if isinstance(message, Heartbeat)] == [
        ["good", "bad"],
        ["bad"],
        [],
    ]


def test_shutdown_in_the_middle_leaves_nothing_behind(controller: Controller) -> None:
    controller.until(Credits)
    worker = controller.worker()
    controller.ask("t", "7", HANGS)
    controller.send(Welcome(heartbeat_seconds=0.1))
    controller.send(Shutdown(reason="the run is over"))
    controller.until(Goodbye)
    assert controller.process.wait(PATIENCE) == 0
    assert gone(worker)


def test_a_refused_actor_leaves_with_an_error(controller: Controller) -> None:
    controller.send(Rejected(reason="another run"))
    assert controller.process.wait(PATIENCE) == 1


def test_sigkill_of_the_actor_takes_the_hanging_worker_along(controller: Controller) -> None:
    controller.until(Credits)
    worker = controller.worker()
    controller.ask("t", "7", HANGS)
    while not any(isinstance(beat, Heartbeat) and beat.tasks for beat in controller.heard):
        controller.until(
            Heartbeat, len([beat for beat in controller.heard if isinstance(beat, Heartbeat)]) + 1
        )
    controller.process.kill()
    assert gone(worker)


def test_the_end_of_the_supervisor_takes_actor_and_worker_along(controller: Controller) -> None:
    worker = controller.worker()
    os.close(controller.parent_fd)
    controller.parent_fd = os.open(os.devnull, os.O_RDONLY)
    controller.process.wait(PATIENCE)
    assert gone(worker)


# ---- the worker alone ----------------------------------------------------------------------------


def start_worker(*program: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", *(program or ("-m", "zppo_actors.grading.worker"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_worker_answers_and_leaves_at_the_end_of_stdin() -> None:
    process = start_worker()
    output, _ = process.communicate(pack(WARM_UP) * 2, timeout=PATIENCE)
    size = len(output) // 2
    assert output[:size] == output[size:]
    [grade] = msgspec.msgpack.decode(output[4:size], type=list[Grade])
    assert grade == Grade(reward=1.0, answer="(x+1)^2")
    assert process.returncode == 0


def test_the_worker_ends_itself_when_nobody_kills_it() -> None:
    process = start_worker()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(pack(WARM_UP))
    process.stdin.flush()
    assert read_frame(process.stdout) is not None  # type: ignore[arg-type]
    process.stdin.write(pack(GradeRequest(responses=[HANGS], gold="7", grader="math", seconds=0.2)))
    process.stdin.flush()
    assert process.wait(PATIENCE) == -signal.SIGPROF
    process.communicate()


def test_a_worker_that_sleeps_ends_itself_too() -> None:
    process = start_worker("-c", SCRIPTED)
    assert process.stdin is not None
    process.stdin.write(
        pack(GradeRequest(responses=[r"\boxed{sleep}"], gold="7", grader="scripted", seconds=0.01))
    )
    process.stdin.flush()
    assert process.wait(PATIENCE) == -signal.SIGALRM
    process.communicate()


def test_the_worker_leaves_at_half_a_frame() -> None:
    process = start_worker()
    output, _ = process.communicate(pack(WARM_UP)[:-1], timeout=PATIENCE)
    assert (output, process.returncode) == (b"", 0)


# ---- the handle on it ----------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[GradeWorker]:
    worker = GradeWorker(0.25, [sys.executable, "-P", "-c", SCRIPTED])
    until_ready(worker)
    yield worker
    worker.close()


def until_ready(worker: GradeWorker) -> None:
    while not worker.ready:
        assert worker.poll(1.0) is None


def graded(worker: GradeWorker, answer: str) -> Grade:
    until_ready(worker)
    worker.submit([rf"\boxed{{{answer}}}"], "7", "scripted")
    return the_grade(worker)


def test_every_response_gets_one_grade_whatever_the_worker_does(scripted: GradeWorker) -> None:
    right, wrong = Grade(reward=1.0, answer="7"), Grade(reward=0.0, answer="8")
    assert graded(scripted, "7") == right
    assert graded(scripted, "die") == Grade(reward=0.0, note=CRASHED, undecided=True)
    assert graded(scripted, "8") == wrong
    assert graded(scripted, "burn") == Grade(reward=0.0, note=TIMED_OUT, undecided=True)
    assert graded(scripted, "raise") == Grade(
        reward=0.0, note="the grader failed: ValueError: no such answer", undecided=True
    )
    assert graded(scripted, "7") == right


def test_a_worker_killed_from_outside_costs_no_reward(scripted: GradeWorker) -> None:
    os.kill(scripted.pid, signal.SIGKILL)
    assert graded(scripted, "7") == Grade(reward=1.0, answer="7")


def frozen(worker: GradeWorker, answer: str) -> int:
    """Submit an answer to a worker that is stopped, and wait for longer than the limit; returns the
    worker's pid."""
    until_ready(worker)
    pid = worker.pid
    os.kill(pid, signal.SIGSTOP)
    worker.submit([rf"\boxed{{{answer}}}"], "7", "scripted")
    end = time.monotonic() + 2 * worker.timeout_seconds
    while time.monotonic() < end:
        assert worker.poll(0.05) is None
    return pid


def the_grade(worker: GradeWorker) -> Grade:
    while (grades := worker.poll(1.0)) is None:
        pass
    [grade] = grades
    return grade


def test_a_frozen_worker_makes_no_right_answer_wrong(scripted: GradeWorker) -> None:
    pid = frozen(scripted, "7")
    with contextlib.suppress(
        ProcessLookupError
    ):  # so long a stall that it was replaced; that costs no reward either
        os.kill(pid, signal.SIGCONT)
    assert the_grade(scripted) == Grade(reward=1.0, answer="7")


def test_a_worker_that_stays_frozen_is_replaced_and_the_answer_graded_by_the_next(
    scripted: GradeWorker,
) -> None:
    first = frozen(scripted, "7")
    assert the_grade(scripted) == Grade(reward=1.0, answer="7")
    assert scripted.pid != first


def test_a_grader_that_sleeps_is_tried_twice_and_then_counts_as_timed_out(
    scripted: GradeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    assert graded(scripted, "sleep") == Grade(reward=0.0, note=TIMED_OUT, undecided=True)
    assert [STARVED in record.getMessage() for record in caplog.records] == [True, True]
    assert graded(scripted, "7") == Grade(reward=1.0, answer="7")


def test_processor_time_is_counted_for_each_response_anew_and_burning_it_gets_no_second_try(
    scripted: GradeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    assert graded(scripted, "burn") == Grade(reward=0.0, note=TIMED_OUT, undecided=True)
    assert [TIMED_OUT in record.getMessage() for record in caplog.records] == [True]


def test_it_takes_one_response_at_a_time_of_any_size(scripted: GradeWorker) -> None:
    larger_than_the_pipe = "word " * 400_000 + r"\boxed{7}"
    scripted.submit([larger_than_the_pipe], "7", "scripted")
    with pytest.raises(RuntimeError, match="the grade worker is busy"):
        scripted.submit([r"\boxed{7}"], "7", "scripted")
    assert the_grade(scripted).reward == 1.0
    if sys.platform == "linux":  # elsewhere there is no limit on memory
        assert graded(scripted, "eat").note == "the grader failed: MemoryError: "


def test_a_worker_that_cannot_start_is_an_error() -> None:
    worker = GradeWorker(1.0, [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(
        RuntimeError,
        match=r"the grade worker cannot start: the grade worker crashed \(exit code 3\)",
    ):
        until_ready(worker)
    worker.close()
