"""Scripted worlds around the scheduler: actors without processes, a virtual clock, answers that are
a function of the task. One seed drives the order in which things finish, get lost and crash."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from zppo.algorithm.methods import get_method
from zppo.config.served import teacher_pool
from zppo.config.topology import Topology
from zppo.data.question import Question
from zppo.prompting.prompts import PromptSet
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.heldout import EvaluationResult
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import waiting
from zppo_protocol import codec
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask, TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.support import support_of
from zppo_protocol.values import FROZEN, Grade

PROMPTS = PromptSet()
Rewards = Callable[[str, int], list[float]]


def topology(**sections: Any) -> Topology:
    """A small topology; keyword arguments are sections."""
    raw: dict[str, Any] = {
        "data": {"train": "train.jsonl"},
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return msgspec.convert(raw, Topology)


def questions(count: int, prefix: str = "q") -> list[Question]:
    return [Question(id=f"{prefix}{i}", text=f"what is {i}?", answer=str(i)) for i in range(count)]


def scripted_rewards(seed: int, difficulty: float = 0.5) -> Rewards:
    """Rewards that depend on nothing but the group's id; each question has its own chance of being
    answered."""

    def rewards(group_id: str, n: int) -> list[float]:
        _, question, kind = group_id.split("/")
        skill = random.Random(f"{seed}/{question}").choice([0.0, 0.2, 0.5, 0.9, 1.0])
        chance = 0.7 if kind.startswith("teacher") else skill * (1 - difficulty) * 2
        rng = random.Random(f"{seed}/{group_id}")
        return [float(rng.random() < chance) for _ in range(n)]

    return rewards


def response(task_id: str, index: int) -> tuple[str, str]:
    """(text, parsed answer) of one completion: some are near-duplicates of others, some are not."""
    rng = random.Random(f"{task_id}/{index}")
    answer = str(index % 3)
    return f"{' '.join(rng.choices('aab', k=8))} {task_id} \\boxed{{{answer}}}", answer


def mark(task_id: str) -> int:
    """A token that tells which task a rollout or a prompt belongs to."""
    return zlib.crc32(task_id.encode()) >> 1


def samples(task: GenerateTask, versions: list[int]) -> GroupSamples:
    """`n` completions of two tokens each: the task's mark and the index; `versions` sampled one
    token each."""
    n = task.n
    token_ids = np.array([[mark(task.task_id), i] for i in range(n)], np.int32).reshape(-1)
    return GroupSamples(
        prompt_ids=np.array([1, mark(task.task_id)], np.int32),
        token_ids=token_ids,
        log_probs=np.zeros(2 * n, np.float32),
        offsets=np.arange(0, 2 * n + 1, 2, dtype=np.int32),
        version_spans=np.array([[1, v] for _ in range(n) for v in versions], np.int32),
        texts=[response(task.task_id, i)[0] for i in range(n)],
        finish_reasons=["stop"] * n,
        support=support_of([token_ids[i : i + 1] for i in range(2 * n)])
        if task.with_support
        else None,
    )


def text_alone(drawn: GroupSamples) -> GroupSamples:
    """The same from an engine that sees only text."""
    nothing = np.zeros(0, np.int32)
    return msgspec.structs.replace(
        drawn,
        prompt_ids=nothing,
        token_ids=nothing,
        log_probs=np.zeros(0, np.float32),
        offsets=np.zeros_like(drawn.offsets),
        version_spans=np.zeros((0, 2), np.int32),
    )


def scores(task: ScoreTask) -> TokenScores:
    """The teacher likes every token as it stands."""
    log_probs = np.full((len(task.token_ids), 1), -0.1, np.float32)
    return TokenScores(token_ids=task.token_ids[:, None], log_probs=log_probs)


@dataclass
class Fake:
    """One fake actor: what it may still be sent, what it works on, what it has loaded."""

    name: str
    role: str
    pool: str
    capacity: int
    incarnation: int = 0
    version: int = -1
    granted: int = 0
    hangs: bool = False
    held: dict[str, Assignment] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)


class World:
    """Drives a scheduler to the end of its run. What must hold at an instant is asserted where it
    happens."""

    def __init__(
        self,
        topology: Topology,
        corpus: list[Question],
        *,
        seed: int,
        rewards: Rewards | None = None,
        heldout: list[Question] | None = None,
        crash_rate: float = 0.0,
        failure_rate: float = 0.0,
        hang_rate: float = 0.0,
        text_only_teachers: bool = False,
        undecided_rate: float = 0.0,
    ) -> None:
        self.topology, self.corpus, self.heldout = topology, corpus, heldout or []
        self.method = get_method(topology.method.name)
        self.rng = random.Random(seed)
        self.rewards = rewards or scripted_rewards(seed)
        self.crash_rate, self.failure_rate, self.hang_rate = crash_rate, failure_rate, hang_rate
        self.text_only_teachers, self.undecided_rate = text_only_teachers, undecided_rate
        self.now = 0.0
        self.steps: list[events.Trained] = []
        self.sent: list[TrainWindow] = []
        self.dispatched: list[str] = []
        """Ids of all tasks in the order in which they were handed out."""
        self.evaluations: list[EvaluationResult] = []
        self.saved: tuple[bytes, int] | None = None
        self.restores = 0
        self.shipped: TrainWindow | None = None
        self.scheduler = self.build(None)
        self.actors: dict[str, Fake] = {}
        self.join_all()

    def build(self, state: SchedulerState | None) -> Scheduler:
        return Scheduler(
            self.topology, self.method, self.corpus, self.heldout, PROMPTS, state, self.now
        )

    def feed(self, event: events.Event) -> list[events.Outcome]:
        """All that the scheduler is ever told goes through here."""
        return self.scheduler.handle(event)

    def accepts(self, event: events.Answer) -> bool:
        """Whether somebody waited for the answer."""
        answered = [o for o in self.feed(event) if not isinstance(o, events.Cost)]
        return answered == [events.Accepted(event.task_id)]

    def assignments(self, now: float) -> list[Assignment]:
        """Let the scheduler act; what it hands out."""
        return [o for o in self.feed(events.Tick(now=now)) if isinstance(o, Assignment)]

    def grant(self, name: str, count: int) -> None:
        self.feed(events.Granted(actor=name, count=count))

    def heard(self, name: str, tasks: list[str], now: float) -> list[str]:
        """What a worker has lost of its tasks when it says that it holds these."""
        stuck = self.feed(events.Heard(actor=name, tasks=tasks, now=now))
        return [task for o in stuck if isinstance(o, events.WorkerStuck) for task in o.tasks]

    def fail(self, actor: Fake, task_id: str, reason: str, *, retryable: bool) -> None:
        """A worker gives a task back, and has room for another."""
        job = actor.held.pop(task_id).job
        self.feed(
            events.Failed(
                task_id=task_id,
                actor=actor.name,
                incarnation=actor.incarnation,
                reason=reason,
                retryable=retryable,
                now=self.now,
            )
        )
        self.grant(actor.name, job.cost)
        actor.granted += job.cost

    def join_all(self) -> None:
        self.actors = {}
        method = self.topology.method
        capacity = max(method.group_size, method.teacher_group_size, 4)
        teachers = [
            ("teacher", teacher_pool(i), 1) for i in range(1 + len(self.topology.more_teachers))
        ]
        for role, pool, count in [("rollout", "rollout", 2), *teachers, ("grader", "grader", 2)]:
            for i in range(count):
                self.join(Fake(f"{pool}-{i}", role, pool, capacity if role != "grader" else 2))
        self.feed(events.TrainerFree(now=self.now))

    def join(self, actor: Fake) -> None:
        self.actors[actor.name] = actor
        self.feed(
            events.ActorJoined(actor=actor.name, pool=actor.pool, incarnation=actor.incarnation)
        )
        if actor.role == "rollout":
            actor.version = self.scheduler.published
            self.feed(events.PolicyLoaded(actor=actor.name, version=actor.version))
        actor.granted = actor.capacity
        self.grant(actor.name, actor.capacity)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self, max_events: int = 100_000) -> World:
        for _ in range(max_events):
            if self.scheduler.finished:
                return self
            self.turn()
        raise AssertionError(f"the run does not end: {waiting(self.scheduler)}")

    def turn(self) -> None:
        """Let the scheduler act, then let one random thing happen."""
        self.now += 1.0
        for outcome in self.feed(events.Tick(now=self.now)):
            match outcome:
                case Assignment():
                    self.receive(outcome)
                case TrainWindow():
                    self.take_window(outcome)
                case EvaluationResult():
                    self.evaluations.append(outcome)
        windows = self.scheduler.windows.values()
        flying = [v.question.id for w in windows for v in w.visits if not v.late]
        assert len(flying) == len(set(flying)), "a question is in flight twice"
        self.watch()
        if self.rng.random() < self.crash_rate:
            self.crash()
            return
        happenings = [
            (a, task_id) for a in self.actors.values() if not a.hangs for task_id in a.held
        ]
        loads = [
            a
            for a in self.actors.values()
            if a.role == "rollout" and a.version < self.scheduler.published
        ]
        choices = [*happenings, *loads, *(["publish", "train"] if self.shipped is not None else [])]
        if choices:
            self.happen(self.rng.choice(choices))

    def watch(self) -> None:
        """Some actors hang, some lose a task; the scheduler must notice both, and the actor starts
        anew."""
        for actor in self.actors.values():
            if not actor.hangs:
                self.feed(events.Progressed(actor=actor.name, now=self.now))
            if actor.held and self.rng.random() < self.hang_rate:
                actor.hangs = self.rng.random() < 0.5
                if not actor.hangs:
                    actor.held.pop(self.rng.choice(sorted(actor.held)))
        late = self.feed(events.LeaseCheck(now=self.now))
        stuck = [outcome.actor for outcome in late if isinstance(outcome, events.WorkerStuck)]
        stuck += [
            a.name for a in self.actors.values() if self.heard(a.name, list(a.held), self.now)
        ]
        for name in dict.fromkeys(stuck):
            self.replace(self.actors[name])

    def happen(self, what: Any) -> None:
        if what == "publish":
            self.feed(events.PolicyPublished(version=self.scheduler.trained + 1))
        elif what == "train":
            self.train()
        elif isinstance(what, Fake):
            what.version = self.scheduler.published
            self.feed(events.PolicyLoaded(actor=what.name, version=what.version))
        else:
            self.finish(*what)

    def receive(self, assignment: Assignment) -> None:
        actor, job = self.actors[assignment.worker], assignment.job
        self.dispatched.append(job.id)
        actor.granted -= job.cost
        assert actor.granted >= 0, "dispatched without credit"
        if isinstance(job.message, GenerateTask) and actor.role == "rollout":
            self.check_dispatch(actor, job.message)
        actor.held[job.id] = assignment
        actor.began[job.id] = actor.version

    def check_dispatch(self, actor: Fake, task: GenerateTask) -> None:
        index = int(task.task_id.split("/")[0])
        bound = self.topology.scheduler.max_staleness
        if task.kind == "evaluate":
            assert actor.version >= index, (
                "an evaluation was answered by a policy older than it asks for"
            )
        else:
            assert index <= self.scheduler.horizon + bound, "a window was dispatched too early"
            assert actor.version >= index - bound, "an engine with too old a policy got a task"

    def finish(self, actor: Fake, task_id: str) -> None:
        began = actor.began.pop(task_id)
        if self.rng.random() < self.failure_rate:
            self.fail(actor, task_id, "scripted", retryable=True)
            return
        job = actor.held.pop(task_id).job
        versions = [FROZEN, FROZEN] if actor.role == "teacher" else [began, actor.version]
        event = self.answer(actor, job.message, versions)
        assert self.accepts(event)
        assert not self.accepts(event), "twice"
        actor.granted += job.cost
        self.grant(actor.name, job.cost)

    def answer(
        self, actor: Fake, message: GenerateTask | GradeTask | ScoreTask, versions: list[int]
    ) -> events.Answer:
        """What a worker says to a task: a function of the task, but for the versions."""
        task_id = message.task_id
        reply: dict[str, Any] = {
            "task_id": task_id,
            "actor": actor.name,
            "incarnation": actor.incarnation,
            "now": self.now,
        }
        match message:
            case GradeTask():
                group = task_id.removesuffix("/grade")
                rewards = self.rewards(group, len(message.responses))
                grades = [
                    Grade(
                        reward=r, answer=response(group, i)[1], undecided=self.undecided(group, i)
                    )
                    for i, r in enumerate(rewards)
                ]
                return events.Graded(grades=grades, **reply)
            case ScoreTask():
                return events.Scored(scores=scores(message), **reply)
            case GenerateTask():
                drawn = samples(message, versions)
                if actor.role == "teacher" and self.text_only_teachers:
                    drawn = text_alone(drawn)
                if message.kind == "judge":
                    drawn = msgspec.structs.replace(drawn, texts=[self.judge(task_id)])
                return events.Sampled(samples=drawn, **reply)

    def judge(self, task_id: str) -> str:
        """What an honest judge says about one response of a group."""
        group, _, response = task_id.rpartition("/judge-")
        method = self.topology.method
        size = method.teacher_group_size if "/teacher" in group else method.group_size
        return '{"verdict": "%s"}' % (
            "correct" if self.rewards(group, size)[int(response)] else "wrong"
        )

    def responses(self, group_id: str, n: int) -> list[tuple[str, str]]:
        """(text, parsed answer) of each response of a group."""
        return [response(group_id, i) for i in range(n)]

    def undecided(self, group_id: str, index: int) -> bool:
        """Whether the grading of a response came to no end, so that it counts as wrong if it is not
        right."""
        return random.Random(f"{group_id}/{index}/undecided").random() < self.undecided_rate

    # ---- the trainer -----------------------------------------------------------------------------

    @property
    def scores_remotely(self) -> bool:
        teacher = self.topology.teacher
        return self.method.needs_scores and teacher is not None and teacher.scoring == "remote"

    def take_window(self, window: TrainWindow) -> None:
        assert self.shipped is None
        assert window.step == self.scheduler.trained, "windows must be trained in order"
        bound = self.topology.scheduler.max_staleness
        for group in window.groups:
            versions = group.samples.version_spans[:, 1]
            sampled = versions[versions != FROZEN]
            assert self.method.teacher_tokens or len(sampled) == len(versions), (
                "the teacher is in the gradient"
            )
            assert all(window.step - bound <= version <= window.step for version in sampled), (
                "the staleness bound"
            )
            assert (group.scores is not None) == self.scores_remotely, "the teacher's scores"
            supported = self.topology.student.sampling.truncates and len(sampled) > 0
            assert (group.samples.support is not None) == supported, "the tokens' supports"
        self.shipped = window

    def train(self) -> None:
        assert self.shipped is not None
        step = self.shipped.step
        self.sent.append(self.shipped)
        self.shipped = None
        self.feed(events.PolicyPublished(version=step + 1))
        [trained] = self.feed(events.StepTrained(step=step, seconds=1.0))
        assert isinstance(trained, events.Trained)
        self.steps.append(trained)
        self.feed(events.TrainerFree(now=self.now))
        if self.rng.random() < 0.5:
            self.saved = (codec.dumps(self.scheduler.state()), len(self.steps))

    # ---- faults ----------------------------------------------------------------------------------

    def crash(self) -> None:
        """An actor dies, or (rarely) the controller does and the run continues from its last
        checkpoint."""
        if self.rng.random() < 0.1:
            self.restore()
            return
        actor = self.actors[self.rng.choice(sorted(self.actors))]
        self.replace(actor)

    def replace(self, actor: Fake) -> None:
        """The next incarnation of an actor; late answers of the old one must not count."""
        self.feed(events.ActorLeft(actor=actor.name))
        for assignment in actor.held.values():
            late = self.answer(actor, assignment.job.message, [0, 0])
            assert not self.accepts(late), "late answer counted"
        self.join(
            Fake(
                actor.name,
                actor.role,
                actor.pool,
                actor.capacity,
                incarnation=actor.incarnation + 1,
            )
        )

    def restore(self) -> None:
        self.restores += 1
        data, count = self.saved or (None, 0)
        self.shipped = None
        self.steps, self.sent = self.steps[:count], self.sent[:count]
        state = codec.loads(data, SchedulerState) if data is not None else None
        self.evaluations = [
            e for e in self.evaluations if state is not None and e.step in state.evaluated
        ]
        self.scheduler = self.build(state)
        self.join_all()
