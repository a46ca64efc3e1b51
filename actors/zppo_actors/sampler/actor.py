"""The asyncio shell around one engine, shared by rollout and teacher actors.

Invariant: of every task's n credits each is given back exactly once, as its sequences end and the
rest when the task is answered, and every task is answered exactly once, with its
samples or with a reason. Heartbeats list a task from its arrival until its answer is sent, whether
its sequences run or wait.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Literal, TypeVar

import msgspec

from zppo.config.served import ServedModel
from zppo.config.topology import ENGINE_NAMES, Topology
from zppo.errors import EXIT_FAILED, UserError
from zppo.records.timeline import START, WAIT
from zppo_actors.engines import Engine, EngineError, EngineSpec, create
from zppo_actors.membership import LONGEST_REASON, Leave, Membership
from zppo_actors.process import ActorContext
from zppo_actors.sampler.occupancy import Occupancy
from zppo_actors.weights import PublicationRefused
from zppo_actors.weights.layout import weight_path
from zppo_protocol.errors import ProtocolError
from zppo_protocol.messages import (
    Credits,
    Forgotten,
    GenerateResult,
    GenerateTask,
    Heartbeat,
    Hello,
    LoadPolicy,
    PolicyLoaded,
    PolicyRefused,
    ScoreResult,
    ScoreTask,
    TaskFailed,
)
from zppo_protocol.sockets import AsyncDealer

CLOSE_SECONDS = 5.0
"""How long a leaving actor waits for its engine; the decode thread does not keep the process
alive."""

CREDIT_SECONDS = 0.01
"""Between two messages of credits, so that what they cost the controller does not grow with the
sequences; a slot waits for its next sequence so much longer at most."""

RATE_SECONDS = 10.0
"""`tokens_per_second` is averaged exponentially over about so long, since engines work in
bursts."""

log = logging.getLogger("zppo.engine_actor")
E = TypeVar("E", bound=BaseException)


def run(context: ActorContext, served: ServedModel) -> int:
    """Build the engine of this actor and serve it until told to leave; returns the exit code.
    Raises UserError."""
    engine = create(EngineSpec(served=served, device=served.device(context.index)))
    check_capacity(engine.capacity, served, context.topology)
    return asyncio.run(_serve(context, engine, served.role))


def check_capacity(capacity: int, served: ServedModel, topology: Topology) -> None:
    """A group waits until there is room for all of it. The plan has checked the engines built in;
    what one of the user's own takes is known only now. Raises UserError."""
    if served.actor.engine in ENGINE_NAMES:
        return
    method, heldout = topology.method, topology.data.heldout is not None
    size, setting = method.group_size, "method.group_size"
    if served.role == "teacher":
        size, setting = method.teacher_group_size, "method.teacher_group_size"
    elif heldout and topology.evaluation.samples > size:
        size, setting = topology.evaluation.samples, "evaluation.samples"
    if capacity < size:
        raise UserError(
            f"{served.actor_path}.engine: {served.actor.engine!r} takes {capacity} sequences at "
            f"once; expected at least {size}, the {setting}, because a group is sampled as a whole"
        )


async def _serve(context: ActorContext, engine: Engine, role: Literal["rollout", "teacher"]) -> int:
    dealer = AsyncDealer(context.credentials, context.limits)
    try:
        return await EngineActor(context, engine, dealer, role).run()
    finally:
        try:
            await asyncio.wait_for(engine.close(), CLOSE_SECONDS)
        except TimeoutError:
            log.warning("the engine did not stop within %g s", CLOSE_SECONDS)
        dealer.close()


class Work:
    """One task in hand: `left` of its sequences have not ended. The same task may come twice, if
    its lease ran out."""

    def __init__(self, task: GenerateTask | ScoreTask, since: float = 0.0) -> None:
        self.task = task
        self.since = since
        """when it came, on the clock of the timeline"""
        self.left = task.n


class EngineActor:
    """Messages in and out of one engine."""

    def __init__(
        self,
        context: ActorContext,
        engine: Engine,
        dealer: AsyncDealer,
        role: Literal["rollout", "teacher"],
    ) -> None:
        self._context = context
        self._engine = engine
        self._dealer = dealer
        self._role: Literal["rollout", "teacher"] = role
        self._membership = Membership(context.topology.transport.heartbeat_seconds)
        self._running: list[Work] = []
        self._returned = 0
        self._room = asyncio.Event()
        self._loading = asyncio.Lock()
        self._open = False
        self._occupancy: Occupancy | None = None
        """from the first credits on"""
        self._timeline = context.timeline
        self._idle_since = self._timeline.now()

    async def run(self) -> int:
        """Greet, then serve until `Shutdown`, `Rejected` or an engine beyond repair. Raises
        UserError for a mistake of the user that only a task has brought up.

        Consumes: what `_listen` takes. Produces: Hello, Goodbye, and what the three loops and the
        tasks send. Waits for: the first of its tasks to raise. Is unblocked by: `Leave`, or any
        failure of a task.
        """
        self._timeline.room(self._engine.capacity)
        self._timeline.span(START, self._timeline.began)
        await self._dealer.send(self._hello())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(tasks))
                tasks.create_task(self._give_back())
                tasks.create_task(self._beat())
        except* UserError as mistakes:
            end: Leave | UserError = _first(mistakes)
        except* Leave as leaves:
            end = _first(leaves)
        if isinstance(end, UserError):
            raise end
        await self._dealer.send(end.goodbye())
        return end.exit_code

    # ---- loops -----------------------------------------------------------------------------------

    async def _listen(self, tasks: asyncio.TaskGroup) -> None:
        """The receiving loop.

        Consumes: every message of the controller. Produces: one asyncio task per GenerateTask,
        ScoreTask and LoadPolicy, so that it never waits for the engine. Waits for: the next
        message. Is unblocked by: the controller.
        """
        while True:
            message = await self._dealer.receive()
            match message:
                case GenerateTask() | ScoreTask():
                    if not self._running:
                        self._timeline.span(WAIT, self._idle_since)
                    self._running.append(work := Work(message, self._timeline.now()))
                    self._hold()
                    tasks.create_task(self._do(work))
                case LoadPolicy():
                    tasks.create_task(self._load(message))
                case Forgotten():
                    if self._membership.greets_again(time.monotonic()):
                        await self._dealer.send(self._hello())
                case _:
                    if self._membership.begins_anew(message):
                        self._open, self._returned = False, 0
                    self._membership.obey(message)
                    # A rollout actor opens with its first policy; a teacher's weights are there.
                    if self._membership.welcomed and self._role == "teacher":
                        self._open_up()

    async def _give_back(self) -> None:
        """The credit loop.

        Consumes: ended sequences. Produces: Credits, all that have come together since the last
        ones, which are `CREDIT_SECONDS` ago at least. Waits for: an ended sequence, or the right to
        open. Is unblocked by: `_free`.
        """
        while True:
            await self._room.wait()
            self._room.clear()
            count, self._returned = self._returned, 0
            if count:
                await self._dealer.send(Credits(count=count))
                await asyncio.sleep(CREDIT_SECONDS)

    async def _beat(self) -> None:
        """The heartbeat loop.

        Consumes: the engine's token count. Produces: Heartbeat, in which `progress` rises only with
        tokens sampled or scored. Waits for: the next beat. Is unblocked by: the clock.
        """
        before, then, rate = self._engine.progress, time.monotonic(), 0.0
        while True:
            await asyncio.sleep(self._membership.seconds)
            self._check_engine()
            progress, now = self._engine.progress, time.monotonic()
            # 1 - exp(-seconds / RATE_SECONDS), so that a late beat weighs what it covers.
            share = -math.expm1((then - now) / RATE_SECONDS)
            rate += share * ((progress - before) / (now - then) - rate)
            before, then = progress, now
            await self._dealer.send(self._heartbeat(progress, rate))

    # ---- one message -----------------------------------------------------------------------------

    async def _do(self, work: Work) -> None:
        """Do one task, answer it, and give back what credits of it are left."""
        answer = await self._answer(work)
        try:
            await self._dealer.send(answer)
        except ProtocolError as error:
            # Too large, or not finite: the next try would be no better.
            await self._dealer.send(
                _failed(work.task, f"the answer is no valid message: {error}", retryable=False)
            )
        self._ended(work, work.left)
        self._running.remove(work)
        self._note(work)
        self._check_engine()

    async def _answer(self, work: Work) -> GenerateResult | ScoreResult | TaskFailed:
        task = work.task
        try:
            if isinstance(task, ScoreTask):
                return ScoreResult(task_id=task.task_id, scores=await self._engine.score(task))
            if task.min_version > self._engine.policy_version:
                have = self._engine.policy_version
                return _failed(
                    task,
                    f"needs policy version {task.min_version}, loaded is {have}",
                    retryable=True,
                )
            samples = await self._engine.generate(task, lambda count: self._ended(work, count))
            return GenerateResult(task_id=task.task_id, samples=samples)
        except EngineError as error:
            return _failed(task, str(error), retryable=error.retryable)
        except UserError:
            raise  # which no other try mends
        except Exception as error:
            # One task must not take the others with it; the controller bounds how often it is
            # tried.
            log.exception("task %s failed unexpectedly", task.task_id)
            return _failed(task, f"{type(error).__name__}: {error}", retryable=True)

    def _note(self, work: Work) -> None:
        """Put an answered task on the timeline."""
        kind = "score" if isinstance(work.task, ScoreTask) else work.task.kind
        self._timeline.task(kind, work.task.task_id, work.since, work.task.n)
        if not self._running:
            self._idle_since = self._timeline.now()

    async def _load(self, message: LoadPolicy) -> None:
        """Load one policy after the other; the first one opens the actor for work."""
        version = message.manifest.version
        # Where it lies on this host, which need not be the trainer's.
        path = weight_path(self._context.runtime, version)
        manifest = msgspec.structs.replace(message.manifest, path=str(path))
        async with self._loading:
            start = time.monotonic()
            try:
                digest = await self._engine.load_policy(manifest)
            except (EngineError, PublicationRefused) as error:
                self._check_engine()  # a refusal says that the old weights keep serving
                log.warning("%s", error)
                await self._dealer.send(PolicyRefused(version=version, reason=str(error)))
                return
            seconds = time.monotonic() - start
            self._timeline.span("load", self._timeline.now() - seconds, step=version)
        await self._dealer.send(PolicyLoaded(version=version, digest=digest, seconds=seconds))
        self._open_up()

    # ---- credits and state -----------------------------------------------------------------------

    def _hello(self) -> Hello:
        return self._context.hello(self._role, self._engine.capacity)

    def _open_up(self) -> None:
        """Grant what room the engine has, once for each Welcome."""
        if not self._open:
            self._open = True
            if self._occupancy is None:
                self._occupancy = Occupancy(self._engine.capacity, time.monotonic())
            self._free(max(0, self._engine.capacity - self._sequences()))

    def _ended(self, work: Work, count: int) -> None:
        """So many sequences of the task have ended: their credits go back, but never more than the
        task cost."""
        count = min(count, work.left)
        work.left -= count
        self._hold()
        if self._open:  # else it is among what `_open_up` grants
            self._free(count)

    def _hold(self) -> None:
        if self._occupancy is not None:
            self._occupancy.holds(self._sequences(), time.monotonic())

    def _sequences(self) -> int:
        return sum(work.left for work in self._running)

    def _free(self, count: int) -> None:
        self._returned += count
        self._room.set()

    def _check_engine(self) -> None:
        if (reason := self._engine.broken) is not None:
            raise Leave(EXIT_FAILED, reason)

    def _heartbeat(self, progress: int, rate: float) -> Heartbeat:
        sequences = self._sequences()
        running = min(sequences, self._engine.capacity)
        stats = {
            "tokens_total": float(progress),
            "tokens_per_second": rate,
            "running": float(running),
            "waiting": float(sequences - running),
        }
        occupancy = self._occupancy
        if occupancy is not None and (idle := occupancy.take_idle(time.monotonic())) is not None:
            stats["idle"] = idle
        return Heartbeat(
            progress=progress, tasks=[work.task.task_id for work in self._running], stats=stats
        )


def _failed(task: GenerateTask | ScoreTask, reason: str, *, retryable: bool) -> TaskFailed:
    return TaskFailed(task_id=task.task_id, reason=reason[:LONGEST_REASON], retryable=retryable)


def _first(group: BaseExceptionGroup[E]) -> E:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
