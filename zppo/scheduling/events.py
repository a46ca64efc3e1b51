"""What the scheduler is told (events) and what comes of it (outcomes): two unions of plain values.

Nothing else moves a scheduler. Events are written and read by `zppo_protocol.codec`, and the time
that matters is in them, so a log of events, fed to a scheduler with the same settings and the same
state at its start, leads to the same state and the same outcomes: a run can be played again.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from zppo.algorithm.composition import Composition
from zppo.algorithm.steps import Fate
from zppo.algorithm.window import Visit, Window
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.heldout import EvaluationResult
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import Grade


class _Event(Struct, frozen=True, kw_only=True, tag=True):
    """Base of the events. `now` is in seconds of any clock that does not go back."""


# ---- workers -------------------------------------------------------------------------------------


class ActorJoined(_Event, frozen=True, kw_only=True):
    """A worker greets; an earlier incarnation of the same name is gone."""

    actor: str
    pool: str
    incarnation: int


class ActorLeft(_Event, frozen=True, kw_only=True):
    """A worker is gone. Its jobs are queued again."""

    actor: str


class PolicyLoaded(_Event, frozen=True, kw_only=True):
    """A worker samples with this policy version from now on."""

    actor: str
    version: int


class Granted(_Event, frozen=True, kw_only=True):
    """A worker has room for jobs of so much cost more."""

    actor: str
    count: int


class Progressed(_Event, frozen=True, kw_only=True):
    """A worker did real work: its leases start anew."""

    actor: str
    now: float


class Heard(_Event, frozen=True, kw_only=True):
    """The jobs that a worker says it holds. What it has lost is queued again, and shows as
    WorkerStuck."""

    actor: str
    tasks: list[str]
    now: float


# ---- their answers -------------------------------------------------------------------------------


class _Reply(_Event, frozen=True, kw_only=True):
    """What a worker says of one task. It counts only from the incarnation that holds the task."""

    task_id: str
    actor: str
    incarnation: int
    now: float

    def as_failure(self, reason: str) -> Failed:
        """The same reply as a failed try; the task may be tried again."""
        return Failed(
            task_id=self.task_id,
            actor=self.actor,
            incarnation=self.incarnation,
            now=self.now,
            reason=reason,
            retryable=True,
        )


class Sampled(_Reply, frozen=True, kw_only=True):
    """Completions of a group, or what the teacher wrote about one response."""

    samples: GroupSamples


class Scored(_Reply, frozen=True, kw_only=True):
    """The teacher's distribution at the tokens of a group."""

    scores: TokenScores


class Graded(_Reply, frozen=True, kw_only=True):
    """Verdicts on all responses of a group."""

    grades: list[Grade]


class Failed(_Reply, frozen=True, kw_only=True):
    """The worker lives but the task did not work."""

    reason: str
    retryable: bool


Answer: TypeAlias = Sampled | Scored | Graded

# ---- the trainer and the caller ------------------------------------------------------------------


class TrainerFree(_Event, frozen=True, kw_only=True):
    """The trainer can take a window."""

    now: float


class StepTrained(_Event, frozen=True, kw_only=True):
    """The trainer finished the step it was sent. Trained comes of it."""

    step: int
    seconds: float


class PolicyPublished(_Event, frozen=True, kw_only=True):
    """The weights of this version can be loaded."""

    version: int


class Tick(_Event, frozen=True, kw_only=True):
    """Time to act: open what may be opened, hand out what can be handed out, ship what is ready."""

    now: float


class LeaseCheck(_Event, frozen=True, kw_only=True):
    """Time to look for workers that hold jobs and did nothing for the lease time."""

    now: float


class StopAsked(_Event, frozen=True, kw_only=True):
    """Open nothing and ship nothing from now on; what is in flight is kept."""


Event: TypeAlias = (
    ActorJoined
    | ActorLeft
    | PolicyLoaded
    | Granted
    | Progressed
    | Heard
    | Sampled
    | Scored
    | Graded
    | Failed
    | TrainerFree
    | StepTrained
    | PolicyPublished
    | Tick
    | LeaseCheck
    | StopAsked
)


# ---- outcomes ------------------------------------------------------------------------------------


class Accepted(Struct, frozen=True):
    """Somebody waited for this answer, and it is stored; of any other nothing comes."""

    task_id: str


class Refused(Struct, frozen=True, kw_only=True):
    """An answer that was not let in, and why; its task is queued again."""

    actor: str
    task_id: str
    reason: str


class WorkerStuck(Struct, frozen=True, kw_only=True):
    """A worker that lives does not do its work, and should start anew; `tasks` are queued again."""

    actor: str
    tasks: list[str]
    reason: str


class Cost(Struct, frozen=True, kw_only=True):
    """What a teacher's work of this kind (draw, compress, hint, judge, score) has cost more."""

    kind: str
    requests: int = 0
    tokens: int = 0


class Opened(Struct, frozen=True):
    """A window was opened: its questions are in flight."""

    window: Window


class Trained(Struct, frozen=True, kw_only=True):
    """What the end of a step did. `composed` are the groups that were sent to the trainer, with
    `tokens` of prompts and responses in all; `settled` the windows of which nothing is left to
    train."""

    window: Window
    composed: list[tuple[Visit, Composition]]
    tokens: int
    fates: list[Fate]
    settled: list[int]


Outcome: TypeAlias = (
    Accepted
    | Refused
    | WorkerStuck
    | Assignment
    | Cost
    | Opened
    | TrainWindow
    | Trained
    | EvaluationResult
)
"""An Assignment is to be sent to its worker, a TrainWindow to the trainer; the others are news."""
