"""Every message that crosses a socket: the verbs. What they carry is in `values` and `samples`.

A message is a frozen msgspec Struct with a tag; the union `AnyMessage` is what the codec decodes.

Who says what: actors greet with `Hello`, pull work by granting `Credits` (unit: sequences for
engines, questions for graders, windows for the trainer), prove progress with `Heartbeat`, and
answer each task exactly once. The controller answers with tasks, policy announcements and
`Shutdown`. The supervisor reports process deaths and stop requests, and receives `Status` and the
final `RunEnded`.

Shape legend: P prompt tokens, N completions of the group, T response tokens of all completions laid
end to end.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta, Struct

from zppo_protocol.errors import ProtocolError
from zppo_protocol.samples import (
    GroupSamples,
    TokenScores,
    TrainGroup,
    check_media,
    check_media_tokens,
    check_responses,
    check_result,
)
from zppo_protocol.values import (
    FROZEN,
    ActorOrder,
    ActorReport,
    BootName,
    Count,
    FilePart,
    Finite,
    Grade,
    GroupKind,
    Media,
    Name,
    PolicyManifest,
    Positive,
    Prompt,
    Reason,
    Role,
    Sampling,
    Second,
    Text,
    Value,
)

PROTOCOL_VERSION = 8


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=True):
    """Base of all messages; the tag is the class name."""


# ---- from actors to the controller ---------------------------------------------------------------


class Hello(Message, frozen=True):
    """First word of an actor. `incarnation` counts restarts of the same actor name; the highest one
    wins."""

    protocol_version: int
    run_id: Name
    actor: Name
    role: Role
    incarnation: Count
    pid: Count
    capacity: Count


class Heartbeat(Message, frozen=True):
    """Sent from the work loop. `progress` rises with every unit of real work, so a stuck loop
    shows.

    `stats` are gauges for the live view, e.g. `tokens_total`, `tokens_per_second`, `running`,
    `waiting`, and `idle`, the share of an engine's room and time without work since the last one.
    """

    progress: Count
    tasks: list[Name] = []
    stats: dict[str, Finite] = {}


class Credits(Message, frozen=True):
    """Permission to send `count` more units of work."""

    count: Count


class GenerateResult(Message, frozen=True):
    task_id: Name
    samples: GroupSamples

    def __post_init__(self) -> None:
        check_result(self.samples)


class ScoreResult(Message, frozen=True):
    """`scores` along the axis T of the task."""

    task_id: Name
    scores: TokenScores


class GradeResult(Message, frozen=True):
    """`grades` in the order of the task's responses."""

    task_id: Name
    grades: list[Grade]


class TaskFailed(Message, frozen=True):
    """The actor lives but this task did not work; `retryable` is false when another try must fail
    as well."""

    task_id: Name
    reason: Reason
    retryable: bool


class PolicyPublished(Message, frozen=True):
    manifest: PolicyManifest


class WeightSource(Message, frozen=True):
    """Where the other hosts fetch policies: a server of TLS with exactly this `certificate` (PEM),
    which lets in who shows the `token`. The controller passes it on to those that fetch."""

    host: Name
    port: Annotated[int, Meta(ge=1, le=65_535)]
    certificate: Annotated[str, Meta(max_length=16_384)]
    token: Name

    def __repr__(self) -> str:  # the token is a secret, and messages may be logged
        return f"WeightSource(host={self.host!r}, port={self.port})"


class PolicyLoaded(Message, frozen=True):
    """Acknowledgement with the digest of what was really loaded; by an actor that fetches weights
    for its host, that they lie there."""

    version: Count
    digest: Name
    seconds: Finite


class PolicyRefused(Message, frozen=True):
    """The old weights keep serving; `reason` says what was wrong with the publication."""

    version: Count
    reason: Reason


class StepTrained(Message, frozen=True):
    """Step `step` is done and the policy now has version `step + 1`. `group_ids` are the groups
    that entered the loss.

    `metrics` are per-step scalars.
    """

    step: Count
    group_ids: list[Name]
    metrics: dict[str, Finite]
    seconds: Finite


class CheckpointSaved(Message, frozen=True):
    """The trainer's share of the checkpoint after `step` trained steps lies in its partial
    folder."""

    step: Count


class CheckpointFailed(Message, frozen=True):
    """The trainer's share could not be written, e.g. because the disk is full; nothing of it is
    left, and training may go on."""

    step: Count
    reason: Reason


class Goodbye(Message, frozen=True):
    """The actor leaves of its own will; empty reason means it was told to."""

    reason: Reason = ""


# ---- from the supervisor to the controller -------------------------------------------------------


class ActorExited(Message, frozen=True):
    """A process ended. `restarting` says whether the supervisor starts the next incarnation."""

    actor: Name
    incarnation: Count
    verdict: Reason
    restarting: bool


class ActorsMoving(Message, frozen=True):
    """Actors that have used the processor or moved bytes since the last such message, also those
    that say nothing yet because they load a model."""

    actors: list[Name]


class StopRequested(Message, frozen=True):
    """Finish what the trainer has, checkpoint, end."""

    reason: Reason


# ---- from the controller -------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    heartbeat_seconds: Finite


class Rejected(Message, frozen=True):
    """The controller will not work with this peer (wrong run, old incarnation, other protocol
    version)."""

    reason: Reason


class GenerateTask(Message, frozen=True):
    """Sample `n` completions of `prompt`. The engine must have loaded a policy version >=
    `min_version`.

    `seed` makes the sampling reproducible where the engine can. `with_support` asks for the support
    of every token, which has at most `sampling.top_k` ids. Costs `n` credits.
    """

    task_id: Name
    kind: GroupKind
    prompt: Prompt
    n: Annotated[int, Meta(ge=1, le=65_536)]
    sampling: Sampling
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    min_version: Annotated[int, Meta(ge=FROZEN)] = FROZEN
    with_support: bool = False

    @property
    def support_limit(self) -> int:
        """The most ids that the support of a token may have; 0 where nobody asks for it."""
        return self.sampling.top_k if self.with_support else 0

    def __post_init__(self) -> None:
        if self.with_support and self.sampling.top_k < 1:
            raise ProtocolError("sampling.top_k must be at least 1 with_support, got 0")


class ScoreTask(Message, frozen=True):
    """Say what the teacher would have written at each token of given responses: its `top_k` most
    probable tokens.

    `prompt_ids` [P], `token_ids` [T] and `offsets` [N+1] are int32 as in `GroupSamples`, in the
    vocabulary that student and teacher share. Log-probs are those of the softmax at `temperature`.
    `media` and `media_tokens` as in `TrainGroup`. Costs N credits.
    """

    task_id: Name
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    offsets: np.ndarray
    top_k: Annotated[int, Meta(ge=1, le=4096)]
    temperature: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    media: list[Media] = []
    media_tokens: list[Positive] = []

    @property
    def n(self) -> int:
        """Number of responses."""
        return len(self.offsets) - 1

    def __post_init__(self) -> None:
        check_responses(self.prompt_ids, self.token_ids, self.offsets)
        check_media(self.media, self.media_tokens)
        check_media_tokens(self.media_tokens, self.prompt_ids)


class GradeTask(Message, frozen=True, omit_defaults=True):
    """Score responses against `gold`. `grader` names a rule of `zppo.grading`. Costs one credit.
    `question` and `row`, all columns as JSON, are there for rewards that read them."""

    task_id: Name
    gold: Text
    responses: list[Text]
    grader: Name
    question: Text = ""
    row: Text = ""


class TrainWindow(Message, frozen=True):
    """All groups of one window, to be trained as step `step` with I updates. Costs one credit."""

    step: Count
    groups: list[TrainGroup]


class SaveCheckpoint(Message, frozen=True):
    """Asks the trainer, between two windows, for its share of the checkpoint after `step` trained
    steps."""

    step: Count


class LoadPolicy(Message, frozen=True):
    manifest: PolicyManifest


class ReleasePolicy(Message, frozen=True):
    """No engine reads this version any more; its file may be written over."""

    version: Count


class RestartActor(Message, frozen=True):
    """Asks the supervisor to kill and restart an actor that is alive but stuck."""

    actor: Name
    incarnation: Count
    reason: Reason


class ActorStatus(Value, frozen=True):
    """One line of the live view."""

    actor: Name
    role: Role
    state: str
    incarnation: Count
    credits: int
    leases: int
    policy_version: int
    stats: dict[str, Finite]


class Status(Message, frozen=True):
    """What the live view shows, about twice a second. `counters` and `gauges` carry stable names
    (docs/metrics.md)."""

    phase: str
    step: Count
    total_steps: Count
    eta_seconds: Finite
    actors: list[ActorStatus]
    counters: dict[str, int]
    gauges: dict[str, Finite]
    waiting: list[str]
    events: list[str]
    advice: list[str] = []


class Forgotten(Message, frozen=True):
    """The controller does not know the sender, or no more: what it was sent is others' work now. It
    may greet again, and is then welcomed as one without credits."""


class Shutdown(Message, frozen=True):
    reason: Reason


class RunEnded(Message, frozen=True):
    """The last word of the controller: what happened, in one sentence, and the exit code of the
    run."""

    verdict: Reason
    exit_code: Annotated[int, Meta(ge=0, le=255)]


# ---- between the supervisor and the agents of further hosts --------------------------------------


class HostHello(Message, frozen=True):
    """First word of a host agent, whose name is the host's. `life` tells this process from an
    earlier one of the same host; `versions` are those of what must be the same everywhere."""

    protocol_version: int
    host: Name
    life: Name
    versions: dict[Name, Name]


class HostWelcome(Message, frozen=True):
    """The supervisor takes the host. The agent says a `HostReport` every `beat_seconds`, and ends
    its processes when it has heard nothing for `lease_seconds`. `folders`: model folders and what
    their fingerprints must be."""

    beat_seconds: Finite
    lease_seconds: Finite
    folders: dict[Name, Name]


class HostOrders(Message, frozen=True):
    """All that is wanted of a host from now on, so one that is lost is made good by the next.

    `attempt` is the attempt's run id, empty between attempts; what belongs to another is ended.
    `record` is the run's `run.json`, and `secrets` the key files of the host's actors by name, both
    until the host has reported the attempt. `actors` are the processes that are to run; any other
    is ended. `received` says how much of each file has come: its part number and bytes."""

    attempt: str
    record: bytes
    secrets: dict[Name, bytes]
    actors: list[ActorOrder]
    received: dict[Name, tuple[Count, Count]]


class HostReport(Message, frozen=True):
    """All that is to be known of a host. `attempt` is the one that it has set up, if any. `clock`
    is what its monotonic clock showed when this was sent, in seconds, and `boot` names that
    clock."""

    attempt: str
    actors: list[ActorReport]
    parts: list[FilePart]
    boot: BootName = ""
    clock: Second = 0.0


AnyMessage: TypeAlias = (
    Hello | Heartbeat | Credits | GenerateResult | ScoreResult | GradeResult | TaskFailed |
    PolicyPublished | WeightSource | PolicyLoaded | PolicyRefused | StepTrained | Goodbye |
    ActorExited | ActorsMoving | StopRequested | Welcome | Rejected | GenerateTask | ScoreTask |
    GradeTask | TrainWindow | SaveCheckpoint | CheckpointSaved | CheckpointFailed | LoadPolicy |
    ReleasePolicy | Forgotten | RestartActor | Status | Shutdown | RunEnded | HostHello |
    HostWelcome | HostOrders | HostReport
)  # fmt: skip
