"""The scheduler: events in, assignments and windows out. No sockets, no clock, no threads
(sans-IO).

It runs Algorithm 1 as a pipeline of windows. What happens inside a window is in
`zppo.scheduling.stages`; several windows may be at different stages at once, as far as
`zppo.scheduling.pacing` allows.

Invariants (held by the property tests): a window is opened and every job assigned within the
staleness bound; windows ship in order; each question of the corpus is X_new exactly once per pass;
|X_replay| and the BCQ + NCQ count obey ρ_replay and ρ_aug; nothing is discarded for being slow.

Callers feed events (`actor_joined`, `granted`, `sampled`, …, each with what the peer said) and then
drain `assignments(now)` and `next_window(now)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec import Struct, field

from zppo.algorithm.composition import Composition, train_group
from zppo.algorithm.methods.base import Method
from zppo.algorithm.replay_buffer import BufferState, ReplayBuffer
from zppo.algorithm.steps import Fate, Recipe, compose, draw_replayed, refresh_buffer
from zppo.algorithm.window import EVALUATE, PLAIN, Visit, Window
from zppo.config.topology import Topology
from zppo.data.cursor import CorpusCursor, CursorState
from zppo.data.question import Question
from zppo.prompting.prompts import PromptSet
from zppo.scheduling.dispatch import Assignment, Dispatcher
from zppo.scheduling.heldout import Evaluation, EvaluationResult
from zppo.scheduling.jobs import JobFactory, Target
from zppo.scheduling.pacing import Pacer, PacerState
from zppo.scheduling.stages import CannotGoOn, Stages
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import Grade


class RunFailure(RuntimeError):
    """The run cannot go on; the text is the verdict the user reads."""


class SchedulerState(Struct, kw_only=True):
    """Everything that must not be lost, at the moment a step was trained. Leases and credits are
    not part of it: after a restore, windows ask again for what they miss."""

    trained: int
    next_window: int
    cursor: CursorState
    buffer: BufferState
    windows: list[Window]
    pacer: PacerState
    evaluated: list[int] = field(default_factory=list)


class Trained(Struct, frozen=True, kw_only=True):
    """What the end of a step did. `composed` are the groups that were sent to the trainer."""

    window: Window
    composed: list[tuple[Visit, Composition]]
    fates: list[Fate]


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
    ) -> None:
        config = topology.scheduler
        self.topology, self.prompts = topology, prompts
        self.recipe = Recipe.of(topology, method)
        self.jobs = JobFactory(topology)
        self.stages = Stages(self.recipe, prompts, self.jobs, self._ask)
        self.dispatcher = Dispatcher(config.lease_seconds)
        self.cursor = CorpusCursor(
            questions, topology.run.seed, topology.run.epochs, state.cursor if state else None
        )
        self.buffer = ReplayBuffer(config.buffer_capacity)
        if state is not None:
            self.buffer.restore(state.buffer)
        self.pacer = Pacer(config.max_staleness, state.pacer if state else None)
        self.heldout = list(heldout)
        self.trained = state.trained if state else 0
        self.published = self.trained
        self.next_index = state.next_window if state else 0
        self.windows: dict[int, Window] = {}
        self.evaluation: Evaluation | None = None
        self.evaluated: list[int] = list(state.evaluated) if state else []
        self.stopping = False
        self._targets: dict[str, Target] = {}
        self._missing: dict[int, set[str]] = {}
        self._ready_since: dict[int, float] = {}
        self._opened: list[int] = []
        self._shipped: int | None = None
        self._trainer_idle_since: float | None = None
        self._step_seconds = 0.0
        for window in state.windows if state else []:
            self._track(window, now)

    # ---- what a caller may ask -------------------------------------------------------------------

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
        )

    def ready(self, index: int) -> bool:
        """Whether a window has all its graded groups."""
        return (
            index in self.windows
            and self.windows[index].phase == "composed"
            and not self._missing[index]
        )

    @property
    def phase(self) -> str:
        """One word for the live view."""
        if self.stopping:
            return "stopping"
        if self.finished:
            return "finished"
        if self.evaluation is not None and not self.windows:
            return "evaluating"
        return "training" if self.windows or self.trained else "starting"

    def waiting(self) -> list[str]:
        """Who waits for whom, in plain words; the watchdog's verdict and a part of the live
        view."""
        lines = []
        if self._shipped is not None:
            lines.append(f"step {self._shipped} is in the trainer")
        elif self._trainer_idle_since is None:
            lines.append("the trainer has not asked for a window yet")
        elif not self.ready(self.trained) and self.trained in self._missing:
            lines.append(f"the trainer waits for window {self.trained}")
        for index in sorted(self._missing):
            if self._missing[index]:
                lines.append(f"window {index} waits for {self._describe(self._missing[index])}")
        if self.evaluation is not None:
            left = sum(not group.done for group in self.evaluation.groups)
            lines.append(
                f"the held-out evaluation waits for {left} of {len(self.evaluation.groups)} groups"
            )
        if not self.stopping and self._blocked_by_staleness():
            lines.append(
                f"window {self.next_index} waits for step {self.trained} (staleness bound)"
            )
        return lines

    def _blocked_by_staleness(self) -> bool:
        more = self.next_index < self.total_steps and bool(self.cursor.left)
        return more and not self.pacer.may_open(self.next_index, self.horizon)

    def _describe(self, task_ids: set[str]) -> str:
        """E.g. `3 plain (rollout-0), 1 teacher (queued)`."""
        counts: Counter[str] = Counter()
        holders: dict[str, set[str]] = {}
        for task_id in task_ids:
            target = self._targets[task_id]
            name = target.stage if target.group is None else target.group.kind
            name = f"{name} grades" if target.stage in ("grade", "judge") else name
            counts[name] += 1
            holders.setdefault(name, set()).add(self.dispatcher.holder(task_id) or "queued")
        return ", ".join(
            f"{n} {name} ({', '.join(sorted(holders[name]))})" for name, n in sorted(counts.items())
        )

    # ---- events ----------------------------------------------------------------------------------

    def actor_joined(self, actor: str, pool: str, incarnation: int) -> None:
        self.dispatcher.join(actor, pool, incarnation)

    def actor_left(self, actor: str) -> None:
        """Its jobs are queued again. Raises RunFailure for a job that keeps killing its workers."""
        for task_id in self.dispatcher.leave(actor):
            self._check_attempts(task_id, f"its worker was lost each time, last {actor}")

    def without_progress(self, now: float) -> list[str]:
        """Actors that hold jobs and did nothing for the lease time; the jobs are queued again.

        Raises RunFailure for a job that keeps hanging its workers.
        """
        late = self.dispatcher.expire(now)
        for actor, task_ids in late.items():
            for task_id in task_ids:
                self._check_attempts(task_id, f"its worker made no progress, last {actor}")
        return list(late)

    def heard(self, actor: str, tasks: list[str], now: float) -> list[str]:
        """The jobs the actor says it holds. Returns the ids of those it has lost, which are queued
        again."""
        lost = self.dispatcher.forgotten(actor, tasks, now)
        for task_id in lost:
            self._check_attempts(task_id, f"{actor} lost it")
        return lost

    def granted(self, actor: str, count: int) -> None:
        self.dispatcher.grant(actor, count)

    def progressed(self, actor: str, now: float) -> None:
        """The actor did real work: its leases start anew."""
        self.dispatcher.progress(actor, now)

    def policy_loaded(self, actor: str, version: int) -> None:
        self.dispatcher.loaded(actor, version)

    def policy_published(self, version: int) -> None:
        self.published = max(self.published, version)

    def sampled(
        self, task_id: str, actor: str, incarnation: int, samples: GroupSamples, now: float
    ) -> bool:
        """Completions of a group, or what the teacher wrote about one response. False if nobody
        waits for them."""
        target = self._accept(task_id, actor, incarnation, len(samples.texts), now)
        if target is None:
            return False
        if target.stage != "sample" and target.window is not None:
            target.window.spend(samples)
        if target.candidate is not None:
            # A reply that was cut off may be a thought that had not come to its end.
            self.stages.prepared(
                target, samples.texts[0] if samples.finish_reasons[0] != "length" else None
            )
        elif target.stage == "judge":
            self.stages.judged(target, samples.texts[0])
        else:
            target.the_group.samples = samples
        self._completed(task_id, target, now)
        return True

    def scored(
        self, task_id: str, actor: str, incarnation: int, scores: TokenScores, now: float
    ) -> bool:
        """The teacher's distribution at the tokens of a group. False if nobody waits for it."""
        target = self._accept(task_id, actor, incarnation, len(scores.token_ids), now)
        if target is None:
            return False
        self.stages.scored(target, scores)
        self._completed(task_id, target, now)
        return True

    def graded(
        self, task_id: str, actor: str, incarnation: int, grades: list[Grade], now: float
    ) -> bool:
        """Verdicts on all responses of a group. False if nobody waits for them."""
        target = self._accept(task_id, actor, incarnation, len(grades), now)
        if target is None:
            return False
        target.the_group.grades = grades
        self._completed(task_id, target, now)
        return True

    def failed(
        self, task_id: str, actor: str, incarnation: int, reason: str, retryable: bool, now: float
    ) -> bool:
        """The worker lives but the task did not work. Raises RunFailure when there is no way around
        it."""
        job = self.dispatcher.give_back(task_id, actor, incarnation)
        if job is None:
            return False
        if retryable and self.dispatcher.attempts(task_id) < self.topology.scheduler.max_attempts:
            self.dispatcher.submit(job)
            return True
        self.dispatcher.drop(task_id)
        target = self._targets.pop(task_id)
        try:
            self.stages.give_up(task_id, target, reason)
        except CannotGoOn as error:
            raise RunFailure(str(error)) from None
        self._completed(task_id, target, now)
        return True

    def step_trained(self, step: int, seconds: float) -> Trained:
        """The trainer finished a step: the buffer is refreshed, in window order."""
        if step != self._shipped or step != self.trained:
            raise RunFailure(
                f"the trainer reports step {step}, but step {self._shipped} was shipped"
            )
        window = self.windows.pop(step)
        composed = compose(window, self.recipe)
        self._missing.pop(step)
        self._shipped = None
        self._step_seconds = seconds
        self.trained = step + 1
        return Trained(
            window=window, composed=composed, fates=refresh_buffer(self.buffer, window, self.recipe)
        )

    def trainer_free(self, now: float) -> None:
        """The trainer can take a window."""
        self._trainer_idle_since = now

    # ---- commands --------------------------------------------------------------------------------

    def assignments(self, now: float) -> list[Assignment]:
        """Open what may be opened and hand out what can be handed out."""
        if not self.stopping:
            self._open_evaluation()
            self._open_windows(now)
        return self.dispatcher.assign(now)

    def opened(self) -> list[Window]:
        """The windows opened since the last call, for the journal."""
        opened, self._opened = self._opened, []
        return [self.windows[index] for index in opened if index in self.windows]

    def next_window(self, now: float) -> TrainWindow | None:
        """What to train next, once; None while the trainer is busy or the window is not ready."""
        index = self.trained
        blocked = self.stopping or self._shipped is not None or self._trainer_idle_since is None
        if blocked or index >= self.total_steps or not self.ready(index):
            return None
        waited = now - self._trainer_idle_since if self._trainer_idle_since is not None else 0.0
        self.pacer.shipped(waited, now - self._ready_since.pop(index, now), self._step_seconds)
        self._shipped, self._trainer_idle_since = index, None
        groups = [
            train_group(visit, composition)
            for visit, composition in compose(self.windows[index], self.recipe)
        ]
        return TrainWindow(step=index, groups=groups)

    @property
    def training(self) -> int | None:
        """The step that is in the trainer now."""
        return self._shipped

    def evaluation_done(self) -> EvaluationResult | None:
        """The held-out evaluation that has just finished, once."""
        evaluation = self.evaluation
        if evaluation is None or not evaluation.done:
            return None
        self.evaluation = None
        self.evaluated.append(evaluation.step)
        return evaluation.result()

    # ---- windows ---------------------------------------------------------------------------------

    def _open_windows(self, now: float) -> None:
        while self._may_open():
            new = self.cursor.take(self.topology.scheduler.new_questions, self._in_flight())
            if not new:
                return
            index = self.next_index
            replayed = draw_replayed(
                [question for question, _ in new], self.buffer, self.recipe, index
            )
            visits = [
                Visit(
                    question=question,
                    origin="new",
                    epoch=epoch,
                    plain=self.stages.group(index, question, PLAIN),
                )
                for question, epoch in new
            ]
            visits += [
                Visit(question=q, origin="replay", plain=self.stages.group(index, q, PLAIN))
                for q in replayed
            ]
            self.next_index += 1
            self._opened.append(index)
            self._track(Window(index=index, visits=visits), now)

    def _may_open(self) -> bool:
        if self.next_index >= self.total_steps or not self.cursor.left:
            return False
        if self.heldout and not self.evaluated:
            return False  # the first evaluation must see the policy as it was before the run
        return self.pacer.may_open(self.next_index, self.horizon)

    def _in_flight(self) -> set[str]:
        return {visit.question.id for window in self.windows.values() for visit in window.visits}

    def _track(self, window: Window, now: float) -> None:
        """Take charge of a window, new or restored: ask for everything it misses."""
        self.windows[window.index] = window
        self._missing[window.index] = set()
        self.stages.resume(window)
        self._settle(window, now)

    def _settle(self, window: Window, now: float) -> None:
        """While nothing is missing, go on to the next phase; after the last one the window is
        ready."""
        while not self._missing[window.index] and window.phase != "composed":
            self.stages.proceed(window)
        if not self._missing[window.index]:
            self._ready_since[window.index] = now

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
            self.stages.advance_group(group, question)

    # ---- jobs ------------------------------------------------------------------------------------

    def _ask(self, target: Target) -> None:
        """Queue the job for a target unless it is on its way already."""
        name = target.task_id
        if name in self._targets:
            return
        self._targets[name] = target
        if target.window is not None:
            self._missing[target.window.index].add(name)
        self.dispatcher.submit(self.jobs.job(target, self._min_version(target), self.prompts))

    def _min_version(self, target: Target) -> int:
        if target.window is not None:
            return self.pacer.min_version(target.window.index)
        return self.evaluation.step if self.evaluation is not None else 0

    def _accept(
        self, task_id: str, actor: str, incarnation: int, answers: int, now: float
    ) -> Target | None:
        """The target of an answer that counts, once. One with too few or too many parts is a failed
        try."""
        job = self.dispatcher.leased(task_id, actor, incarnation)
        if job is not None and answers != job.answers:
            reason = f"{actor} answered with {answers} parts instead of {job.answers}"
            self.failed(task_id, actor, incarnation, reason, True, now)
            return None
        return (
            self._targets.pop(task_id)
            if self.dispatcher.accept(task_id, actor, incarnation) is not None
            else None
        )

    def _completed(self, task_id: str, target: Target, now: float) -> None:
        if target.window is None or target.visit is None:
            self.stages.advance_group(target.the_group, target.question)
            return
        self._missing[target.window.index].discard(task_id)
        self.stages.advance(target.window, target.visit)
        self._settle(target.window, now)

    def _check_attempts(self, task_id: str, reason: str) -> None:
        attempts = self.dispatcher.attempts(task_id)
        if attempts >= self.topology.scheduler.max_attempts:
            raise RunFailure(f"task {task_id} failed {attempts} times: {reason}")
