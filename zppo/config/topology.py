"""The topology: everything a run is, as strict msgspec Structs. Defaults are Table 8 of the paper.

Field docstrings of the YAML live in `zppo init`; this file holds types, defaults and ranges.
`zppo.config.load` reads a file into `Topology` and turns every mistake into one sentence;
`zppo.plan.make` checks what spans several fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct, field

from zppo_protocol.values import NewTokens, Sampling, TemplateValue

Positive: TypeAlias = Annotated[int, Meta(ge=1)]
NonNegative: TypeAlias = Annotated[int, Meta(ge=0)]
Share: TypeAlias = Annotated[float, Meta(ge=0.0, le=1.0)]
PositiveFloat: TypeAlias = Annotated[float, Meta(gt=0.0, le=1e30)]
NonNegativeFloat: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e30)]


OPENAI, VLLM = "openai", "vllm"
"""Engines with rules of their own in the plan: a server behind an API, and vLLM."""
JUDGE = "judge"
"""The grader that asks the teacher."""
REASONING_GYM = "reasoning_gym"
PROCEDURAL = (REASONING_GYM,)
"""Prefixes of specifications `PREFIX:…` of sources that make their questions."""


def is_procedural(source: str) -> bool:
    """Whether `source` is no path but the specification of a procedural source."""
    prefix, colon, _ = source.partition(":")
    return bool(colon) and prefix in PROCEDURAL


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections."""


class ResponseSampling(Sampling, frozen=True, kw_only=True):
    """How responses are sampled (Table 8)."""

    max_new_tokens: NewTokens = 12_288


class CompressionSampling(Sampling, frozen=True, kw_only=True):
    """How candidates are compressed (paper, step 4)."""

    max_new_tokens: NewTokens = 512


JUDGE_SAMPLING = ResponseSampling(max_new_tokens=512, temperature=0.0)
"""The judge decodes greedily (paper, Reward)."""


class RunConfig(Config, frozen=True, kw_only=True):
    """`steps` rollout steps, or null for `epochs` passes over the corpus. `directory` must not
    exist yet."""

    name: str = "run"
    directory: str = "runs/{name}"
    seed: NonNegative = 0
    steps: Positive | None = None
    epochs: Positive = 1
    max_restarts: NonNegative = 3
    """Whole-run restarts from the last checkpoint after the controller or the trainer died."""
    no_progress_seconds: PositiveFloat = 600.0


class MethodConfig(Config, frozen=True, kw_only=True):
    """Which method, and the recipe all methods share (paper §3, Table 8, Fig. 6)."""

    name: str = "zppo"
    group_size: Positive = 8
    teacher_group_size: Positive = 4
    hard_threshold: Share = 0.5
    updates_per_step: Positive = 4
    advantage: Literal["norm_without_zero", "norm_with_zero", "center_only", "grpo"] = (
        "norm_without_zero"
    )
    advantage_scope: Literal["minibatch", "step"] = "minibatch"
    clip_low: Share = 0.20
    clip_high: NonNegativeFloat = 0.28
    dual_clip: Annotated[float, Meta(gt=1.0)] | None = 10.0
    loss_normalisation: Literal["token", "sequence"] = "token"
    ratio: Literal["proximal", "behaviour"] = "proximal"
    prefix_share: Share = 0.4
    """α, the share of a correct teacher response that the method `prefix` begins the student's with
    (Algorithm 6)."""
    jsd_beta: Share = 0.5
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence (Algorithms 2 and
    3)."""
    teacher_order: Literal["cascade", "pool"] = "cascade"
    """Ours, with `more_teachers`: ask the next teacher where the one before has no correct
    response, or ask any one."""
    dynamic_sampling: bool = False
    """Ours: leave a question out of the loss if all its groups, the reformulated ones too, came
    back all-same."""
    merge_candidates: bool = False
    """Ours: NCQ shows near-duplicate wrong responses once, with their count."""
    correction: Literal["none", "truncate", "mask"] = "truncate"
    correction_cap: PositiveFloat = 2.0


class DataConfig(Config, frozen=True, kw_only=True):
    """Sources of questions (docs/data.md) and the limits on them. `fields` maps our names to column
    names."""

    train: str
    heldout: str | None = None
    fields: dict[Literal["id", "question", "answer", "images"], str] = {}
    grader: str = "math"
    max_bad_rows: NonNegative = 0
    templates: str | None = None
    """Folder with plain.j2, bcq.j2, …; files that are absent come from the built-in set
    (docs/templates.md)."""
    system_prompt: str | None = None
    max_prompt_tokens: Positive = 4096
    """Plain prompts only; reformulated prompts are bounded by the model's context alone (paper,
    step 4)."""


class ModelConfig(Config, frozen=True, kw_only=True):
    """A model folder and how to decode from it."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sampling: ResponseSampling = ResponseSampling()
    chat_template_kwargs: dict[str, TemplateValue] = {}


class TeacherConfig(ModelConfig, frozen=True, kw_only=True):
    compression: Literal["teacher", "rule"] = "teacher"
    compression_sampling: CompressionSampling = CompressionSampling()
    compression_chat_template_kwargs: dict[str, TemplateValue] | None = None
    """When the teacher compresses, writes hints or judges; null: see
    `zppo.prompting.chat_template.when_writing`."""
    compression_max_lines: Positive = 5
    scoring: Literal["colocated", "remote"] = "colocated"
    """Where distillation gets the teacher's distribution: from a copy inside the trainer, over the
    whole vocabulary, or from the teacher actors, as `score_top_k` tokens and the mass of the
    rest."""
    score_top_k: Annotated[int, Meta(ge=1, le=4096)] = 32


class SchedulerConfig(Config, frozen=True, kw_only=True):
    """Windows, replay and the bound on staleness (policy versions)."""

    max_staleness: NonNegative = 1
    new_questions: Positive = 384
    """|X_new|, questions per window from the corpus."""
    rho_replay: Share = 0.25
    rho_aug: Share = 0.25
    rho_aug_max: Share | None = None
    """Ours: ρ_aug follows the number of hard questions, from `rho_aug` up to this share; null: it
    is fixed."""
    buffer_capacity: Positive = 10_000
    lease_seconds: PositiveFloat = 300.0
    max_attempts: Positive = 5


class OptimizerConfig(Config, frozen=True, kw_only=True):
    """AdamW as in Table 8."""

    learning_rate: PositiveFloat = 1e-6
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clip: PositiveFloat = 1.0
    state_dtype: Literal["bfloat16", "float32"] = "bfloat16"


class ActorConfig(Config, frozen=True, kw_only=True):
    """`count` processes of one role. `devices` are given out in turn; `engine_args` go to the
    engine as they are."""

    count: NonNegative = 1
    engine: str = "transformers"
    engine_args: dict[str, Any] = {}
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    hosts: list[str] = field(default_factory=lambda: ["localhost"])
    threads: Positive | None = None
    """CPU threads of each process; null shares the cores out evenly."""


class GraderConfig(Config, frozen=True, kw_only=True):
    count: Positive = 1
    timeout_seconds: PositiveFloat = 5.0


class TrainerConfig(Config, frozen=True, kw_only=True):
    device: str = "cpu"
    threads: Positive | None = None
    micro_batch_tokens: Positive = 16_384
    """Padded tokens per forward-backward pass."""
    measured_rollouts: Literal["all", "trained"] = "all"
    """Whose entropy and distance from the engine are measured; `trained` spares rollouts with
    advantage 0 the forward pass that only measures them."""
    gradient_checkpointing: bool = False


class ActorsConfig(Config, frozen=True, kw_only=True):
    rollout: ActorConfig = ActorConfig()
    teacher: ActorConfig = ActorConfig()
    grader: GraderConfig = GraderConfig()
    trainer: TrainerConfig = TrainerConfig()
    max_restarts: NonNegative = 10
    """Restarts of one actor before the run gives up."""


class TransportConfig(Config, frozen=True, kw_only=True):
    """`ipc` on one host. `tcp` needs CURVE keys and an allow-list and comes with multi-host
    runs."""

    kind: Literal["ipc"] = "ipc"
    heartbeat_seconds: PositiveFloat = 1.0
    max_message_mib: Positive = 1024


class CheckpointConfig(Config, frozen=True, kw_only=True):
    every: Positive = 20
    keep: Positive = 2


class EvaluationConfig(Config, frozen=True, kw_only=True):
    """Held-out accuracy before and after the run, and every `every` steps (null: only at the
    ends)."""

    every: Positive | None = None
    samples: Positive = 4
    limit: Positive | None = None
    sampling: ResponseSampling | None = None
    """Null decodes as the student does in training."""


class SinksConfig(Config, frozen=True, kw_only=True):
    tensorboard: bool = True
    rollouts: bool = True


class MoreTeacher(ModelConfig, frozen=True, kw_only=True):
    """A further teacher that draws responses, with its processes; the first one alone compresses,
    judges and scores."""

    actor: ActorConfig = ActorConfig()


class Topology(Config, frozen=True, kw_only=True):
    data: DataConfig
    student: ModelConfig
    teacher: TeacherConfig | None = None
    more_teachers: list[MoreTeacher] = []
    run: RunConfig = field(default_factory=RunConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)
