"""The scheduler: events in, assignments and windows out. No sockets, no clock, no threads
(sans-IO).

It runs Algorithm 1 as a pipeline of windows. What happens inside a window is in
`zppo.scheduling.stages`; several windows may be at different stages at once, as far as
`zppo.scheduling.pacing` allows.

Invariants (held by the property tests): a window is opened and every job assigned within the
staleness bound; windows ship in order, or in batches filled with what has finished
(`zppo.scheduling.filling`); each question of the corpus is X_new exactly once per pass; |X_replay|
and the BCQ + NCQ count obey ρ_replay and ρ_aug; nothing is discarded for being slow.

`handle` takes one event in and returns what came of it (`zppo.scheduling.events`); nothing else
moves a scheduler, so a log of its events can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from zppo.algorithm.composition import Composition, tokens_of, train_group
from zppo.algorithm.methods.base import Method
from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.algorithm.steps import Recipe, compose, draw_replayed, refresh_buffer
from zppo.algorithm.window import EVALUATE, Visit, Window, unsampled
from zppo.config.served import teachers
from zppo.config.topology import TeacherBudget, Topology
from zppo.data.cursor import CorpusCursor
from zppo.data.question import Question
from zppo.prompting.prompts import PromptSet
from zppo.scheduling.admission import Bounds, problem
from zppo.scheduling.budget import Budget, Spent
from zppo.scheduling.dispatch import Dispatcher
from zppo.scheduling.events import (
    Accepted,
    ActorJoined,
    ActorLeft,
    Answer,
    Event,
    Failed,
    Graded,
    Granted,
    Heard,
    LeaseCheck,
    Opened,
    Outcome,
    PolicyLoaded,
    PolicyPublished,
    Progressed,
    Refused,
    Sampled,
    Scored,
    StepTrained,
    StopAsked,
    Tick,
    Trained,
    TrainerFree,
    WorkerStuck,
)
from zppo.scheduling.filling import Filled, Filling, InOrder, whole
from zppo.scheduling.heldout import Evaluation, EvaluationResult
from zppo.scheduling.jobs import ROLLOUT_POOL, JobFactory
from zppo.scheduling.pacing import Pacer
from zppo.scheduling.redraws import Redraws
from zppo.scheduling.stages import CannotGoOn, Stages, missing_of_group
from zppo.scheduling.state import SchedulerState, batches_of
from zppo.scheduling.targets import GroupTarget, Place, SampleTarget, Target
from zppo_protocol.messages import TrainWindow


class RunFailure(RuntimeError):
    """The run cannot go on; the text is the verdict the user reads."""


class Scheduler:
    def __init__(
        self,
        topology: Topology,
        method: Method,
        questions: Sequence[Question],
        heldout: Sequence[Question],
        prompts: PromptSet,
        state: SchedulerState | None = None,
        now: float = 0.0,
        bounds: Mapping[str, Bounds] | None = None,
        redraws: Mapping[int, int] | None = None,
        spent: Mapping[str, Spent] | None = None,
    ) -> None:
        """`bounds`: what holds for the answers of a pool. `redraws`: how often the samples of a
        step have been thrown away. `spent`: what the teachers have cost so far, by kind."""
        config = topology.scheduler
        state = state or SchedulerState.fresh(config)
        self.topology, self.prompts = topology, prompts
        self.recipe = Recipe.of(topology, method)
        self.batches = batches_of(config, state.batches)
        redrawn = Redraws(redraws or {}, self.batches)
        self.jobs = JobFactory(topology, redrawn.times)
        self.stages = Stages(self.recipe, prompts, self.jobs)
        limits = topology.teacher.budget if topology.teacher else TeacherBudget()
        self.budget = Budget(limits, (one.pool for one in teachers(topology)), spent)
        self.dispatcher = Dispatcher(
            config.lease_seconds,
            self.budget.admits,
            lambda job: self.filling.current(job, self.published),
        )
        self.cursor = CorpusCursor(questions, topology.run.seed, topology.run.epochs, state.cursor)
        self.buffer = ReplayBuffer(config.buffer_capacity)
        self.buffer.restore(state.buffer)
        self.pacer = Pacer(config.max_staleness, state.pacer)
        self.heldout = list(heldout)
        self.trained = state.trained
        self.published = self.trained
        self.next_index = state.next_window
        self.windows: dict[int, Window] = {}
        self.evaluation: Evaluation | None = None
        self.evaluated = list(state.evaluated)
        self.stopping = False
        self.in_trainer: Window | None = None
        self._sent: tuple[list[tuple[Visit, Composition]], int] = [], 0
        """What is trained now; what of it the trainer has been sent, and how many tokens."""
        self.trainer_idle_since: float | None = None
        self.targets: dict[str, Target] = {}
        """What has been asked for, by task id."""
        self.missing: dict[int, set[str]] = {}
        """The part of it that each window waits for."""
        self.filling: Filling = InOrder(self.windows, self.missing)
        if self.batches == "filled":
            scored = method.needs_scores and self.jobs.scores_remotely
            self.filling = Filled(self.windows, self.missing, self.recipe, config, scored=scored)
        self._step_seconds = 0.0
        self._bounds = bounds or {}
        for window in state.windows:
            again = redrawn.concern(window.index, self.trained)
            self._track(unsampled(window) if again else window, now)

    # ---- what a caller may ask -------------------------------------------------------------------

    @property
    def training(self) -> int | None:
        """The step that is in the trainer now."""
        return self.in_trainer.index if self.in_trainer is not None else None

    @property
    def horizon(self) -> int:
        """Steps that are both trained and published (the h of the staleness inequality)."""
        return min(self.trained, self.published)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: the setting, or as many as the corpus has."""
        limit = self.next_index + self.cursor.windows_left(self.topology.scheduler.new_questions)
        return min(limit, self.topology.run.steps or limit)

    @property
    def finished(self) -> bool:
        """Whether every step is trained and the last held-out evaluation is in."""
        return (
            self.trained >= self.total_steps
            and self._evaluation_due() is None
            and self.evaluation is None
        )

    @property
    def drains(self) -> bool:
        """Whether no window follows that of the next step: it is the last one, or the questions
        left are in flight. Such a step trains all that is open."""
        behind = self.trained + 1
        if self.next_index != behind:
            return False
        return behind >= self.total_steps or self.pacer.may_open(behind, self.horizon)

    def state(self) -> SchedulerState:
        """A snapshot that `Scheduler(..., state=…)` continues from."""
        return SchedulerState(
            trained=self.trained,
            next_window=self.next_index,
            cursor=self.cursor.state(),
            buffer=self.buffer.state(),
            windows=[self.windows[index] for index in sorted(self.windows)],
            pacer=self.pacer.state,
            evaluated=list(self.evaluated),
            batches=self.batches,
        )

    def ready(self, index: int) -> bool:
        """Whether a window has all its graded groups."""
        return index in self.windows and whole(self.windows[index], self.missing)

    # ---- events ----------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Outcome]:
        """Take in one event; what came of it, in the order in which it came.

        Raises RunFailure if the run cannot go on, ProtocolError for credits beyond all reason.
        """
        return [*self._handle(event), *self.budget.news()]

    def _handle(self, event: Event) -> list[Outcome]:
        match event:
            case Sampled() | Scored() | Graded():
                return self._answered(event)
            case Tick():
                return self._act(event.now)
            case Granted():
                self.dispatcher.grant(event.actor, event.count)
            case Progressed():
                self.dispatcher.progress(event.actor, event.now)
            case Heard():
                return self._heard(event)
            case Failed():
                self._failed(event)
            case PolicyLoaded():
                self.dispatcher.loaded(event.actor, event.version)
            case PolicyPublished():
                self.published = max(self.published, event.version)
            case TrainerFree():
                self.trainer_idle_since = event.now
            case StepTrained():
                return [self._step_trained(event)]
            case ActorJoined():
                lost = self.dispatcher.join(event.actor, event.pool, event.incarnation)
                self._queued_again(lost)
            case ActorLeft():
                self._left(event.actor)
            case LeaseCheck():
                return self._without_progress(event.now)
            case StopAsked():
                self.stopping = True
        return []

    # ---- workers ---------------------------------------------------------------------------------

    def _left(self, actor: str) -> None:
        lost = self.dispatcher.leave(actor)
        self._queued_again(lost)
        for task_id in lost:
            self._check_attempts(task_id, f"its worker was lost each time, last {actor}")

    def _without_progress(self, now: float) -> list[Outcome]:
        late = self.dispatcher.expire(now)
        for actor, task_ids in late.items():
            self._queued_again(task_ids)
            for task_id in task_ids:
                self._check_attempts(task_id, f"its worker made no progress, last {actor}")
        reason = f"it made no progress for {self.topology.scheduler.lease_seconds:g} s"
        return [
            WorkerStuck(actor=actor, tasks=tasks, reason=reason) for actor, tasks in late.items()
        ]

    def _heard(self, event: Heard) -> list[Outcome]:
        lost = self.dispatcher.forgotten(event.actor, event.tasks, event.now)
        self._queued_again(lost)
        for task_id in lost:
            self._check_attempts(task_id, f"{event.actor} lost it")
        if not lost:
            return []
        reason = f"it lost {len(lost)} of its tasks, first {lost[0]}"
        return [WorkerStuck(actor=event.actor, tasks=lost, reason=reason)]

    def _queued_again(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            self.filling.lost(task_id)

    def _check_attempts(self, task_id: str, reason: str) -> None:
        attempts = self.dispatcher.attempts(task_id)
        if attempts >= self.topology.scheduler.max_attempts:
            raise RunFailure(f"task {task_id} failed {attempts} times: {reason}")

    # ---- answers ---------------------------------------------------------------------------------

    def _answered(self, answer: Answer) -> list[Outcome]:
        """Store an answer that counts, once, and go on. One that cannot be right is a failed
        try."""
        job = self.dispatcher.leased(answer.task_id, answer.actor, answer.incarnation)
        if job is None:
            return []
        self.budget.answered(job, answer)
        bounds = self._bounds.get(job.pool, Bounds())
        reason = problem(job.message, answer, self.published, bounds)
        if reason is not None:
            self._failed(answer.as_failure(f"{answer.actor} sent {reason}"))
            return [Refused(actor=answer.actor, task_id=answer.task_id, reason=reason)]
        self.dispatcher.accept(answer.task_id, answer.actor, answer.incarnation)
        target = self.targets.pop(answer.task_id)
        _count(target, f"answered/{job.pool}")
        self.stages.received(target, answer)
        self._began(target, job.pool)
        self._completed(target, answer.now)
        return [Accepted(answer.task_id)]

    def _failed(self, failed: Failed) -> None:
        """Try again, or go on without. Raises RunFailure where there is no way around the task."""
        job = self.dispatcher.give_back(failed.task_id, failed.actor, failed.incarnation)
        if job is None:
            return
        self._queued_again([failed.task_id])
        target = self.targets[failed.task_id]
        _count(target, f"failed/{target.kind}/{failed.actor}")
        attempts = self.dispatcher.attempts(failed.task_id)
        if failed.retryable and attempts < self.topology.scheduler.max_attempts:
            self.dispatcher.submit(job)
            return
        self.dispatcher.drop(failed.task_id)
        del self.targets[failed.task_id]
        _count(target, f"given_up/{job.pool}")
        try:
            self.stages.give_up(target, failed.reason)
        except CannotGoOn as error:
            raise RunFailure(str(error)) from None
        self._forget(target)
        self._completed(target, failed.now)

    def _forget(self, target: Target) -> None:
        """A rewritten prompt that was given up is not waited for."""
        groups = target.place.visit.student_groups() if target.place is not None else []
        if isinstance(target, GroupTarget) and not any(target.group is one for one in groups):
            self.filling.lost(target.group.id)

    def _completed(self, target: Target, now: float) -> None:
        """The result of a target is stored: go on with its visit, or with its evaluation group."""
        if target.place is not None:
            window, visit = target.place.window, target.place.visit
            self.missing[window.index].discard(target.task_id)
            self.stages.advance_visit(window, visit)
            self._ask(self.stages.missing_of_visit(target.place))
            self.filling.visit_moved(window, visit, now)
            self._settle(window, now)
        elif isinstance(target, GroupTarget):
            self.stages.advance_group(target.group, target.question)
            self._ask(missing_of_group(target.group, target.question))

    # ---- the trainer -----------------------------------------------------------------------------

    def _step_trained(self, done: StepTrained) -> Trained:
        """The buffer is refreshed, in the order of the steps."""
        window = self.in_trainer
        if window is None or done.step != window.index:
            raise RunFailure(
                f"the trainer reports step {done.step}, but step {self.training} was shipped"
            )
        (composed, tokens), self._sent = self._sent, ([], 0)
        settled = self.filling.trained(window)
        self.in_trainer = None
        self._step_seconds = done.seconds
        self.trained = done.step + 1
        fates = refresh_buffer(self.buffer, window, self.recipe)
        return Trained(
            window=window, composed=composed, tokens=tokens, fates=fates, settled=settled
        )

    def _next_window(self, now: float) -> list[TrainWindow]:
        """What to train next, once; nothing while the trainer is busy or that is not known."""
        step, idle_since = self.trained, self.trainer_idle_since
        blocked = self.stopping or self.in_trainer is not None
        if blocked or idle_since is None or step >= self.total_steps:
            return []
        batch = self.filling.batch(step, drains=self.drains)
        if batch is None:
            return []
        self.pacer.shipped(now - idle_since, now - batch.since, self._step_seconds)
        self.in_trainer, self.trainer_idle_since = batch.window, None
        composed = compose(batch.window, self.recipe)
        names = self.recipe.part_names
        groups = [train_group(visit, composition, names) for visit, composition in composed]
        self._sent = composed, sum(map(tokens_of, groups))
        return [TrainWindow(step=step, groups=groups)]

    # ---- acting ----------------------------------------------------------------------------------

    def _act(self, now: float) -> list[Outcome]:
        opened: list[Opened] = []
        if not self.stopping:
            self._open_evaluation()
            opened = self._open_windows(now)
        assigned = self.dispatcher.assign(now)
        for assignment in assigned:
            job = assignment.job
            self._began(self.targets[job.id], job.pool, job.min_version)
        return [
            *assigned,
            *opened,
            *self._next_window(now),
            *self._evaluation_result(),
        ]

    # ---- windows ---------------------------------------------------------------------------------

    def _open_windows(self, now: float) -> list[Opened]:
        opened: list[Opened] = []
        while self._may_open():
            new = self.cursor.take(self.topology.scheduler.new_questions, self._in_flight())
            if not new:
                break
            index = self.next_index
            replayed = draw_replayed(
                [question for question, _ in new], self.buffer, self.recipe, index
            )
            window = self.stages.window(index, new, replayed)
            self.next_index += 1
            self._track(window, now)
            opened.append(Opened(window))
        return opened

    def _may_open(self) -> bool:
        if self.next_index >= self.total_steps or not self.cursor.left:
            return False
        if self.heldout and not self.evaluated:
            return False  # the first evaluation must see the policy as it was before the run
        if self.evaluation is not None and self.pacer.max_staleness == 0:
            return False  # synchronous: no later policy answers a part of it
        return self.pacer.may_open(self.next_index, self.horizon)

    def _in_flight(self) -> set[str]:
        """Questions whose plain group is not trained yet."""
        visits = (visit for window in self.windows.values() for visit in window.visits)
        return {visit.question.id for visit in visits if not visit.late}

    def _track(self, window: Window, now: float) -> None:
        """Take charge of a window, new or restored: ask for everything it misses."""
        self.windows[window.index] = window
        self.missing[window.index] = set()
        self.filling.opened(window)
        self.stages.advance(window)
        self._ask(self.stages.missing(window))
        self._settle(window, now)
        self.filling.window_moved(window, now)

    def _settle(self, window: Window, now: float) -> None:
        """While nothing is missing, go on to the next phase; after the last one the window is
        ready."""
        if self.missing[window.index]:
            return
        while not self.missing[window.index] and window.phase != "composed":
            self._ask(self.stages.proceed(window))
        self.filling.window_moved(window, now)

    # ---- evaluation ------------------------------------------------------------------------------

    def _evaluation_due(self) -> int | None:
        """The step whose held-out evaluation should start now: before the first step, every
        `every`, after the last."""
        step, every = self.horizon, self.topology.evaluation.every
        if not self.heldout or step in self.evaluated:
            return None
        periodic = every is not None and self.evaluated and step - self.evaluated[-1] >= every
        return step if not self.evaluated or periodic or step >= self.total_steps else None

    def _open_evaluation(self) -> None:
        step = self._evaluation_due()
        if step is None or self.evaluation is not None:
            return
        limit = self.topology.evaluation.limit
        asked = self.heldout[:limit]
        groups = [self.stages.group(step, question, EVALUATE) for question in asked]
        self.evaluation = Evaluation(
            step=step, groups=groups, question_ids=[question.id for question in asked]
        )
        for question, group in zip(asked, groups, strict=True):
            self._ask(missing_of_group(group, question))

    def _evaluation_result(self) -> list[EvaluationResult]:
        """The held-out evaluation that has just finished, once."""
        evaluation = self.evaluation
        if evaluation is None or not evaluation.done:
            return []
        self.evaluation = None
        self.evaluated.append(evaluation.step)
        result = evaluation.result()
        return [result] if result is not None else []

    # ---- asking ----------------------------------------------------------------------------------

    def _ask(self, targets: Iterable[Target]) -> None:
        """Queue the jobs of those targets that are not on their way already."""
        for target in targets:
            name, place = target.task_id, target.place
            if name not in self.targets:
                self.targets[name] = target
                if place is not None:
                    self.missing[place.window.index].add(name)
                job = self.jobs.job(target, self._min_version(place), self.prompts)
                self.dispatcher.submit(job)

    def _began(self, target: Target, pool: str, version: int | None = None) -> None:
        """A group of the student is under way from this version on; None: its samples are there."""
        if isinstance(target, SampleTarget) and target.place and pool == ROLLOUT_POOL:
            self.filling.began(target.place.visit, target.group, version)

    def _min_version(self, place: Place | None) -> int:
        """The oldest policy version that may sample for a window, or for the evaluation."""
        if place is not None:
            return self.pacer.min_version(place.window.index)
        return self.evaluation.step if self.evaluation is not None else 0


def _count(target: Target, outcome: str) -> None:
    """Count what became of a try with the window; evaluations have none."""
    if target.place is not None:
        target.place.window.count_task(outcome)
