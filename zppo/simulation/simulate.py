"""The simulated run: the scheduler of a real one, told of events at the times when machines of
given speeds would bring them.

Events are told in the order of the virtual clock; after all that happen at one instant the
scheduler acts. Actors never die here and nothing is lost on the way. What a controller, sockets and
files take is left out: it is part of the measured speeds, where it matters.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import structs

from zppo.algorithm.methods import get_method
from zppo.algorithm.window import PLAIN
from zppo.config.topology import TeacherBudget, Topology
from zppo.data.question import Question
from zppo.prompting.prompts import PromptSet
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment, Job
from zppo.scheduling.heldout import EvaluationResult
from zppo.scheduling.jobs import GRADER_POOL, ROLLOUT_POOL
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.waiting import waiting
from zppo.simulation.chance import Chance
from zppo.simulation.machines import Engine, Held
from zppo.simulation.outcome import Outcome, Step, size_of, trained_step
from zppo.simulation.world import World
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask, TrainWindow
from zppo_protocol.samples import TokenScores
from zppo_protocol.values import Grade

TRAINER = "trainer"
INCARNATION = 0
SCORE_STEPS = 1
"""Token steps that a teacher takes to read a response."""


class OutOfTime(Exception):
    """The caller has no more patience with a simulation."""


def simulate(
    world: World,
    steps: int,
    seed: int = 0,
    warm: int | None = None,
    *,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run a world for so many steps. The same seed gives the same outcome; other seeds draw other
    questions, lengths and rewards.

    `warm`: steps left out of what is told of the run in all; None: a quarter, and at least as many
    as the bound allows in flight where there are enough. `out_of_time` is asked whenever the
    virtual clock moves.

    Raises UserError for a world in which a job finds no engine (World.check), RunFailure where the
    scheduler does, OutOfTime, and RuntimeError if nothing can happen any more.
    """
    world.check()
    if warm is None:
        warm = warm_steps(steps, world.topology.scheduler.max_staleness)
    return Simulation(world, steps, seed).run(warm, out_of_time)


def warm_steps(steps: int, max_staleness: int) -> int:
    """How many of a run's first steps are left out of what is told of it in all."""
    return min(steps // 2, max(steps // 4, max_staleness + 2))


class Simulation:
    def __init__(self, world: World, steps: int, seed: int) -> None:
        self.world, self.wanted = world, steps
        self.chance = Chance(world, seed)
        topology = _simulated(world, steps, seed)
        self.scheduler = Scheduler(
            topology,
            get_method(topology.method.name),
            _questions("q", self._corpus(topology)),
            _questions("h", world.heldout),
            PromptSet(),
        )
        self.now = 0.0
        self.steps: list[Step] = []
        self.engines: dict[str, Engine] = {}
        self.graders: dict[str, float] = {}
        """Seconds that each grader has worked."""
        self.trained_seconds = 0.0
        self.done: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        """What has been done for each window: plain groups, token steps of the sequences that have
        ended by pool, seconds of graders."""
        self.events = 0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._published = 0
        self._free_since = 0.0
        self._quantum = _quanta(topology, world)
        self._busy: list[dict[str, float]] = []
        """Seconds in use until the end of each step, by pool."""

    def run(self, warm: int, out_of_time: Callable[[], bool] = lambda: False) -> Outcome:
        self._begin()
        while len(self.steps) < self.wanted:
            if out_of_time():
                raise OutOfTime
            if not self._agenda:
                raise RuntimeError(f"nothing happens any more: {waiting(self.scheduler)}")
            self.now = self._agenda[0][0]
            while self._agenda and self._agenda[0][0] == self.now:
                heapq.heappop(self._agenda)[2]()
            self._tell(events.Tick(now=self.now))
        return Outcome(
            steps=self.steps,
            warm=warm,
            busy=self._busy_shares(warm),
            work=self._work(warm),
            events=self.events,
        )

    # ---- the clock and the scheduler -------------------------------------------------------------

    def _at(self, time: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._sequence), what))

    def _tell(self, event: events.Event) -> None:
        """Tell the scheduler, and carry out what comes of it."""
        self.events += 1
        for outcome in self.scheduler.handle(event):
            match outcome:
                case Assignment():
                    self._assigned(outcome.worker, outcome.job)
                case TrainWindow():
                    self._train(outcome)
                case EvaluationResult():
                    self._at(self.now, lambda: None)  # windows that waited for it are opened
                case events.Refused():
                    raise RuntimeError(f"{outcome.task_id}: {outcome.reason}")

    def _begin(self) -> None:
        """Everybody greets; the first policy is loaded and the trainer is free."""
        for pool, (count, speeds) in self.world.pools().items():
            for index in range(count):
                engine = Engine(f"{pool}-{index}", pool, speeds, self.now)
                self.engines[engine.name] = engine
                self._joins(engine.name, pool, speeds.slots)
                if pool == ROLLOUT_POOL:
                    self._loaded(engine, 0)
        for index in range(self.world.topology.actors.grader.count):
            self.graders[f"grader-{index}"] = 0.0
            self._joins(f"grader-{index}", GRADER_POOL, 1)
        self._tell(events.TrainerFree(now=self.now))
        self._at(self.now, lambda: None)

    def _joins(self, name: str, pool: str, credit: int) -> None:
        self._tell(events.ActorJoined(actor=name, pool=pool, incarnation=INCARNATION))
        self._tell(events.Granted(actor=name, count=credit))

    # ---- engines ---------------------------------------------------------------------------------

    def _assigned(self, worker: str, job: Job) -> None:
        message = job.message
        if isinstance(message, GradeTask):
            seconds = self.world.speeds.grader.seconds
            self.graders[worker] += seconds
            self.done[_window(message)][GRADER_POOL] += seconds
            self._at(self.now + seconds, lambda: self._graded(worker, message))
            return
        engine = self.engines[worker]
        engine.advance(self.now)
        if isinstance(message, ScoreTask):
            engine.start(job, [SCORE_STEPS] * message.n, SCORE_STEPS + 1)
        else:
            limit = message.sampling.max_new_tokens
            lengths = self.chance.lengths(message.task_id, message.kind, message.n, limit)
            engine.start(job, lengths, limit)
        self._expect(engine)

    def _expect(self, engine: Engine) -> None:
        """Look at an engine again when its next sequence ends."""
        end, epoch = engine.next_end(), engine.epoch
        if end is not None:
            self._at(end, lambda: self._look(engine, epoch))

    def _look(self, engine: Engine, epoch: int) -> None:
        if engine.epoch != epoch:
            return
        engine.advance(self.now)
        for held in engine.ended():
            self._answered(engine, held)
        give_back = engine.returned - engine.returned % self._quantum[engine.pool]
        if give_back:
            engine.returned -= give_back
            self._tell(events.Granted(actor=engine.name, count=give_back))
        self._expect(engine)

    def _answered(self, engine: Engine, held: Held) -> None:
        message = held.job.message
        steps = sum(held.lengths) + len(held.lengths) * engine.speeds.prompt_steps
        done = self.done[_window(message)]
        done[engine.pool] += steps
        reply: dict[str, Any] = {
            "task_id": held.job.id,
            "actor": engine.name,
            "incarnation": INCARNATION,
            "now": self.now,
        }
        if isinstance(message, ScoreTask):
            self._tell(events.Scored(scores=_scores(message), **reply))
        elif isinstance(message, GenerateTask):
            done[PLAIN] += message.kind == PLAIN
            samples = engine.samples(held, self.world.prompt_tokens)
            self._tell(events.Sampled(samples=samples, **reply))

    def _graded(self, worker: str, task: GradeTask) -> None:
        group = task.task_id.removesuffix("/grade")
        grades = [
            Grade(reward=reward, answer=task.gold if reward else f"wrong {index % 3}")
            for index, reward in enumerate(self.chance.rewards(group, len(task.responses)))
        ]
        self._tell(
            events.Graded(
                grades=grades,
                task_id=task.task_id,
                actor=worker,
                incarnation=INCARNATION,
                now=self.now,
            )
        )
        self._tell(events.Granted(actor=worker, count=1))

    # ---- trainer and weights ---------------------------------------------------------------------

    def _train(self, window: TrainWindow) -> None:
        speed, waited = self.world.speeds.trainer, self.now - self._free_since
        seconds = speed.fixed + sum(size_of(window)) / speed.tokens_per_second
        end, lead = self.now + seconds + speed.publish_seconds, self.scheduler.pacer.lead
        self._at(end, lambda: self._trained(window, seconds, waited, lead))

    def _trained(self, window: TrainWindow, seconds: float, waited: float, lead: int) -> None:
        begin = self.steps[-1].end if self.steps else 0.0
        self.steps.append(
            trained_step(window, self.chance, begin=begin, end=self.now, waited=waited, lead=lead)
        )
        self.trained_seconds += seconds + self.world.speeds.trainer.publish_seconds
        self._busy.append(self._in_use())
        self._published = window.step + 1
        self._tell(events.PolicyPublished(version=self._published))
        for engine in self.engines.values():
            if engine.pool == ROLLOUT_POOL and not engine.loading:
                self._load(engine)
        self._tell(events.StepTrained(step=window.step, seconds=seconds))
        self._free_since = self.now
        self._tell(events.TrainerFree(now=self.now))

    def _load(self, engine: Engine) -> None:
        version, end = self._published, self.now + engine.speeds.load_seconds
        engine.advance(self.now)
        engine.stand(end)
        self._expect(engine)
        self._at(end, lambda: self._loaded(engine, version))

    def _loaded(self, engine: Engine, version: int) -> None:
        engine.advance(self.now)
        engine.loaded(version)
        self._tell(events.PolicyLoaded(actor=engine.name, version=version))
        if version < self._published:
            self._load(engine)

    # ---- what came of it -------------------------------------------------------------------------

    def _in_use(self) -> dict[str, float]:
        """Seconds in use so far: of all slots of a pool, of all graders, of the trainer."""
        seconds: dict[str, float] = defaultdict(float)
        for engine in self.engines.values():
            engine.advance(self.now)
            seconds[engine.pool] += engine.slot_seconds
        seconds[GRADER_POOL] = sum(self.graders.values())
        seconds[TRAINER] = self.trained_seconds
        return dict(seconds)

    def _busy_shares(self, warm: int) -> dict[str, float]:
        begin = self.steps[warm - 1].end if warm else 0.0
        before = self._busy[warm - 1] if warm else {}
        time = self.steps[-1].end - begin
        places = {pool: count * e.slots for pool, (count, e) in self.world.pools().items()}
        places |= {GRADER_POOL: len(self.graders), TRAINER: 1}
        return {
            pool: (seconds - before.get(pool, 0.0)) / (time * places[pool])
            for pool, seconds in self._busy[-1].items()
        }

    def _work(self, warm: int) -> dict[str, float]:
        """See Outcome.work. What is done for one plain group, on the average of the windows that
        have come to their end, times the plain groups of a measured step. Of a window in flight the
        teacher's part may still be to come, and there can be many of them."""
        steps = self.steps[warm:]
        ended = [one for index, one in self.done.items() if index not in self.scheduler.windows]
        done: dict[str, float] = defaultdict(float)
        for one in ended or self.done.values():
            for what, amount in one.items():
                done[what] += amount
        share = sum(s.groups.get(PLAIN, 0) for s in steps) / len(steps) / max(1, done[PLAIN])
        trainer = self.world.speeds.trainer
        tokens = sum(s.tokens + s.prompts for s in steps) / len(steps)
        work = {
            TRAINER: trainer.fixed + tokens / trainer.tokens_per_second + trainer.publish_seconds
        }
        for pool, (count, engines) in self.world.pools().items():
            work[pool] = share * done[pool] / (count * engines.curve.best_rate(engines.slots))
        work[ROLLOUT_POOL] += self.world.speeds.rollout.load_seconds
        work[GRADER_POOL] = share * done[GRADER_POOL] / len(self.graders)
        return work

    def _corpus(self, topology: Topology) -> int:
        scheduler = topology.scheduler
        needed = (self.wanted + scheduler.max_staleness + 2) * scheduler.new_questions
        return min(self.world.corpus or needed, needed)


def _simulated(world: World, steps: int, seed: int) -> Topology:
    """The topology as the scheduler sees it: it lasts, teachers have no budget that may end it, and
    no supports are sent, which take part in nothing here."""
    topology, student, teacher = world.topology, world.topology.student, world.topology.teacher
    if teacher is not None:
        teacher = structs.replace(teacher, budget=TeacherBudget())
    epochs = topology.run.epochs
    if world.corpus is not None:
        new = topology.scheduler.new_questions
        epochs = math.ceil((steps + topology.scheduler.max_staleness + 2) * new / world.corpus)
    sampling = structs.replace(student.sampling, top_p=1.0, top_k=0, min_p=0.0)
    return structs.replace(
        topology,
        run=structs.replace(
            topology.run, seed=seed, steps=steps if world.ends else None, epochs=epochs
        ),
        student=structs.replace(student, sampling=sampling),
        teacher=teacher,
    )


def _questions(prefix: str, count: int) -> list[Question]:
    return [Question(id=f"{prefix}{i}", text=f"question {i}", answer=f"{i}") for i in range(count)]


def _quanta(topology: Topology, world: World) -> dict[str, int]:
    """So many sequences end before an engine gives their credits back, all at once: what the
    smallest job of its pool costs, since fewer can be used for none."""
    method, student = topology.method, topology.method.group_size
    if world.heldout:
        student = math.gcd(student, topology.evaluation.samples)
    writes = topology.teacher is not None and topology.teacher.compression == "teacher"
    teacher = 1 if writes else method.teacher_group_size
    return {pool: student if pool == ROLLOUT_POOL else teacher for pool in world.pools()}


def _window(task: GenerateTask | ScoreTask | GradeTask) -> int:
    """The window that a task is of, or the step after which an evaluation was made."""
    return int(task.task_id.partition("/")[0])


def _scores(task: ScoreTask) -> TokenScores:
    """The teacher likes every token as it stands."""
    log_probs = np.full((len(task.token_ids), 1), -0.1, np.float32)
    return TokenScores(token_ids=task.token_ids[:, None], log_probs=log_probs)
