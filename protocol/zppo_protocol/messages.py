"""Every message that crosses a socket, and the value types inside them.

A message is a frozen msgspec Struct with a tag; the union `AnyMessage` is what the codec decodes. Token streams are
numpy arrays and travel as raw little-endian bytes behind the header, never as lists of numbers. Invariant: a value
whose arrays contradict each other cannot exist, `checks` refuses it when it is built and when it is decoded.

Who says what: actors greet with `Hello`, pull work by granting `Credits` (unit: sequences for engines, questions for
graders, windows for the trainer), prove progress with `Heartbeat`, and answer each task exactly once. The controller
answers with tasks, policy announcements and `Shutdown`. The supervisor reports process deaths and stop requests, and
receives `Status` and the final `RunEnded`.

Shape legend: P prompt tokens, N completions of the group, T response tokens of all completions laid end to end,
S version spans, K most probable tokens of a teacher.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
from msgspec import Meta, Struct

from zppo_protocol.checks import check_result, check_samples, check_score_task, check_scores, check_train_group

PROTOCOL_VERSION = 3

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=512)]
Text: TypeAlias = Annotated[str, Meta(max_length=4_000_000)]
Reason: TypeAlias = Annotated[str, Meta(max_length=20_000)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Finite: TypeAlias = Annotated[float, Meta(ge=-1e300, le=1e300)]
Role: TypeAlias = Literal["rollout", "teacher", "grader", "trainer", "supervisor"]
GroupKind: TypeAlias = Annotated[str, Meta(min_length=1, max_length=32)]
NewTokens: TypeAlias = Annotated[int, Meta(ge=1, le=1_048_576)]
TemplateValue: TypeAlias = bool | int | float | str | None


class Value(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the untagged values inside messages."""


class MediaReference(Value, frozen=True):
    """A picture or video of a question, by reference; the engine host reads the file itself."""

    kind: Literal["image", "video"]
    path: Name


class ChatMessage(Value, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: Text


class ResponseStart(Value, frozen=True):
    """How every response must begin: with the first ⌊share·n⌋ of the n tokens of `text`.

    The engine that knows the tokens cuts them. They end `GroupSamples.prompt_ids`, so they are given and not sampled,
    and are part of `GroupSamples.texts`, so that the whole response is graded.
    """

    text: Text
    share: Annotated[float, Meta(ge=0.0, le=1.0)]


class Prompt(Value, frozen=True):
    """What an engine is asked: chat messages and the media they refer to, in order of appearance.

    `chat_template_kwargs` are variables for the chat template of the model that reads it.
    """

    messages: list[ChatMessage]
    media: list[MediaReference] = []
    start: ResponseStart | None = None
    chat_template_kwargs: dict[str, TemplateValue] = {}


class Sampling(Value, frozen=True):
    """Decoding settings of one task; `top_k` 0 and `top_p` 1.0 mean no truncation. `temperature` 0 is greedy.

    `presence_penalty` is taken from the logits of tokens that the response holds already, before the temperature.
    """

    max_new_tokens: NewTokens
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0


class Usage(Value, frozen=True):
    """What a server counted for so many consecutive completions of a group, all together; None where it did not say."""

    completions: Annotated[int, Meta(ge=1, le=65_536)]
    completion_tokens: Count | None = None
    prompt_tokens: Count | None = None


class GroupSamples(Value, frozen=True):
    """The completions of one prompt.

    `token_ids` [T] int32 and `log_probs` [T] float32 hold the N completions end to end, `offsets` [N+1] int32 bounds
    them. `log_probs` are *behaviour* log-probs: natural logarithms under the distribution that was sampled.
    `version_spans` [S, 2] int32 run-length encodes, along the same axis T, (token count, policy version);
    version -1 is a frozen model, whose log-probs say nothing of the policy. `texts` has N
    entries, or none where nobody reads them (a trainer's window). Raises ProtocolError if they do not fit together.

    An engine that sees only text leaves out what it cannot know: `prompt_ids` and the axis T are empty, `texts` has all
    N entries, and `usage` may tell the lengths. Such samples are graded and shown like others, but never trained on.
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    log_probs: np.ndarray
    offsets: np.ndarray
    version_spans: np.ndarray
    texts: list[Text]
    finish_reasons: list[Literal["stop", "length"]]
    usage: list[Usage] = []

    @property
    def text_only(self) -> bool:
        """Whether token ids and log-probs are unknown."""
        return len(self.prompt_ids) == 0

    def __post_init__(self) -> None:
        check_samples(self)


class TokenScores(Value, frozen=True):
    """A teacher's K most probable tokens at each of T response tokens, best first.

    `token_ids` [T, K] int32, -1 where a row has fewer; `log_probs` [T, K] float32, natural logarithms over the whole
    vocabulary, so what they leave of 1 is the tail.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray

    def __post_init__(self) -> None:
        check_scores(self)


class Grade(Value, frozen=True):
    """The verdict on one response: reward in [0, 1], the parsed final answer, and why if something went wrong."""

    reward: Annotated[float, Meta(ge=0.0, le=1.0)]
    answer: Text | None = None
    note: Reason = ""


class TensorEntry(Value, frozen=True):
    """Where one tensor lies in a weight file (`start`, `size` in bytes) and the xxh3-128 digest of its bytes."""

    name: Name
    dtype: Name
    shape: list[Count]
    start: Count
    size: Count
    digest: Name


class PolicyManifest(Value, frozen=True):
    """One published policy version: the file that holds it, its tensors, and the digest over all of them."""

    version: Count
    path: Name
    tensors: list[TensorEntry]
    digest: Name


class TrainGroup(Value, frozen=True):
    """One group as the trainer needs it; `rewards` is [N] float32. `scores` [T, K] are those of a remote teacher."""

    group_id: Name
    question_id: Name
    kind: GroupKind
    samples: GroupSamples
    rewards: np.ndarray
    scores: TokenScores | None = None

    def __post_init__(self) -> None:
        check_train_group(self)


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=True):
    """Base of all messages; the tag is the class name."""


# ---- from actors to the controller -------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First word of an actor. `incarnation` counts restarts of the same actor name; the highest one wins."""

    protocol_version: int
    run_id: Name
    actor: Name
    role: Role
    incarnation: Count
    pid: Count
    capacity: Count


class Heartbeat(Message, frozen=True):
    """Sent from the work loop. `progress` rises with every unit of real work, so a stuck loop shows.

    `stats` are gauges for the live view, e.g. `tokens_total`, `tokens_per_second`, `running`, `waiting`.
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
    """The actor lives but this task did not work; `retryable` is false when another try must fail as well."""

    task_id: Name
    reason: Reason
    retryable: bool


class PolicyPublished(Message, frozen=True):
    manifest: PolicyManifest


class PolicyLoaded(Message, frozen=True):
    """Acknowledgement with the digest of what was really loaded."""

    version: Count
    digest: Name
    seconds: Finite


class PolicyRefused(Message, frozen=True):
    """The old weights keep serving; `reason` says what was wrong with the publication."""

    version: Count
    reason: Reason


class StepTrained(Message, frozen=True):
    """Step `step` is done and the policy now has version `step + 1`. `group_ids` are the groups that entered the loss.

    `metrics` are per-step scalars.
    """

    step: Count
    group_ids: list[Name]
    metrics: dict[str, Finite]
    seconds: Finite


class CheckpointSaved(Message, frozen=True):
    """The trainer's share of the checkpoint after `step` trained steps lies in its partial folder."""

    step: Count


class Goodbye(Message, frozen=True):
    """The actor leaves of its own will; empty reason means it was told to."""

    reason: Reason = ""


# ---- from the supervisor to the controller -----------------------------------------------------------------------


class ActorExited(Message, frozen=True):
    """A process ended. `restarting` says whether the supervisor starts the next incarnation."""

    actor: Name
    incarnation: Count
    verdict: Reason
    restarting: bool


class StopRequested(Message, frozen=True):
    """Finish what the trainer has, checkpoint, end."""

    reason: Reason


# ---- from the controller -----------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    heartbeat_seconds: Finite


class Rejected(Message, frozen=True):
    """The controller will not work with this peer (wrong run, old incarnation, other protocol version)."""

    reason: Reason


class GenerateTask(Message, frozen=True):
    """Sample `n` completions of `prompt`. The engine must have loaded a policy version >= `min_version`.

    `seed` makes the sampling reproducible where the engine can. Costs `n` credits.
    """

    task_id: Name
    kind: GroupKind
    prompt: Prompt
    n: Annotated[int, Meta(ge=1, le=65_536)]
    sampling: Sampling
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    min_version: Annotated[int, Meta(ge=-1)] = -1


class ScoreTask(Message, frozen=True):
    """Say what the teacher would have written at each token of given responses: its `top_k` most probable tokens.

    `prompt_ids` [P], `token_ids` [T] and `offsets` [N+1] are int32 as in `GroupSamples`, in the vocabulary that student
    and teacher share. Log-probs are those of the softmax at `temperature`. Costs N credits.
    """

    task_id: Name
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    offsets: np.ndarray
    top_k: Annotated[int, Meta(ge=1, le=4096)]
    temperature: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0

    @property
    def n(self) -> int:
        """Number of responses."""
        return len(self.offsets) - 1

    def __post_init__(self) -> None:
        check_score_task(self)


class GradeTask(Message, frozen=True):
    """Score responses against `gold`. `grader` names a rule of `zppo.grading`. Costs one credit."""

    task_id: Name
    gold: Text
    responses: list[Text]
    grader: Name


class TrainWindow(Message, frozen=True):
    """All groups of one window, to be trained as step `step` with I updates. Costs one credit."""

    step: Count
    groups: list[TrainGroup]


class SaveCheckpoint(Message, frozen=True):
    """Asks the trainer, between two windows, for its share of the checkpoint after `step` trained steps."""

    step: Count


class LoadPolicy(Message, frozen=True):
    manifest: PolicyManifest


class ReleasePolicy(Message, frozen=True):
    """No engine reads this version any more; its file may go."""

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
    """What the live view shows, about twice a second. `counters` and `gauges` carry stable names (docs/metrics.md)."""

    phase: str
    step: Count
    total_steps: Count
    eta_seconds: Finite
    actors: list[ActorStatus]
    counters: dict[str, int]
    gauges: dict[str, Finite]
    waiting: list[str]
    events: list[str]


class Shutdown(Message, frozen=True):
    reason: Reason


class RunEnded(Message, frozen=True):
    """The last word of the controller: what happened, in one sentence, and the exit code of the run."""

    verdict: Reason
    exit_code: Annotated[int, Meta(ge=0, le=255)]


AnyMessage: TypeAlias = (
    Hello | Heartbeat | Credits | GenerateResult | ScoreResult | GradeResult | TaskFailed | PolicyPublished
    | PolicyLoaded | PolicyRefused | StepTrained | Goodbye | ActorExited | StopRequested | Welcome | Rejected
    | GenerateTask | ScoreTask | GradeTask | TrainWindow | SaveCheckpoint | CheckpointSaved | LoadPolicy
    | ReleasePolicy | RestartActor | Status | Shutdown | RunEnded
)  # fmt: skip
