"""The topology: everything a run is, as strict msgspec Structs. Defaults are Table 8 of the paper.

The docstring under a field is its help: `zppo init` prints the first paragraph. `zppo.config.load`
reads a file into `Topology` and turns every mistake into one sentence; `zppo.plan` checks what
spans several fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, field
from msgspec.structs import replace

from zppo import extensions
from zppo.config.base import (
    MOST_PROCESSES,
    Config,
    NonNegative,
    NonNegativeFloat,
    Port,
    Positive,
    PositiveFloat,
    Seconds,
    Share,
    Threads,
)
from zppo.config.cluster import LOCALHOST, ClusterConfig, TransportConfig
from zppo.config.method import MethodConfig
from zppo.config.rewards import RewardConfig
from zppo.config.sinks import SinksConfig
from zppo_protocol.values import NewTokens, Sampling, TemplateValue

TRANSFORMERS, OPENAI, VLLM = "transformers", "openai", "vllm"
ENGINE_NAMES = (TRANSFORMERS, VLLM, OPENAI, "simulated")
"""Engines built in; any other name is one of the user's own."""
"""Engines with rules of their own in the plan: a server behind an API, and vLLM."""
JUDGE = "judge"
"""The grader that asks the teacher."""
REASONING_GYM = "reasoning_gym"
_IMPORT_PATH = re.compile(r"(?:.+\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):[^\W\d]\w*")
PROCEDURAL = (REASONING_GYM,)
"""Prefixes of specifications `PREFIX:…` of sources that make their questions."""


Field: TypeAlias = Literal[
    "id", "question", "answer", "images", "videos", "system_prompt", "grader"
]
"""What a row of a source may hold, by our names."""


def is_procedural(source: str) -> bool:
    """Whether `source` is no path but the specification of a procedural source."""
    prefix, colon, _ = source.partition(":")
    return bool(colon) and prefix in PROCEDURAL


def is_own_source(source: str) -> bool:
    """Whether `source` is no path to data but names code of the user's: `./file.py:name`,
    `package.module:name`, or what an installed package announces."""
    named = _IMPORT_PATH.fullmatch(source) is not None and not is_procedural(source)
    return named or source in extensions.names_of("source")


class ResponseSampling(Sampling, frozen=True, kw_only=True):
    """How responses are sampled (Table 8)."""

    max_new_tokens: NewTokens = 12_288
    """longest response, in tokens"""


class StudentSampling(ResponseSampling, frozen=True, kw_only=True):
    """How the student's responses are sampled. What `top_k`, `top_p` or `min_p` leave of the
    vocabulary travels to the trainer, token by token, because the loss is over it."""

    support_limit: Annotated[int, Meta(ge=1, le=4096)] = 128
    """with top_k, top_p or min_p: at most so many most probable tokens are sampled from; each
    token's are stored with it, 4 bytes an id"""

    @property
    def in_training(self) -> Sampling:
        """What engines are asked for: a support that would be larger is cut to the limit, so that
        `top_k` bounds every support."""
        decoding = self.as_asked
        if not self.truncates:
            return decoding
        return replace(decoding, top_k=min(self.top_k or self.support_limit, self.support_limit))

    @property
    def as_asked(self) -> Sampling:
        """The same without what belongs to training: for answers that nobody trains on."""
        names = Sampling.__struct_fields__
        return Sampling(**{name: getattr(self, name) for name in names})


class CompressionSampling(Sampling, frozen=True, kw_only=True):
    """How candidates are compressed (paper, step 4)."""

    max_new_tokens: NewTokens = 512
    """longest compressed candidate, in tokens"""


JUDGE_SAMPLING = ResponseSampling(max_new_tokens=512, temperature=0.0)
"""The judge decodes greedily (paper, Reward)."""


class RunConfig(Config, frozen=True, kw_only=True):
    """`steps` rollout steps, or null for `epochs` passes over the corpus."""

    name: str = "run"
    """name of the run; fills {name} in the directory"""
    directory: str = "runs/{name}"
    """where everything of the run is kept; relative to the current folder; one in which nothing
    was trained is begun again"""
    seed: NonNegative = 0
    """order of the corpus, replay draws and sampling follow from it"""
    steps: Positive | None = None
    """rollout steps to train; null: as many as the passes over the corpus have"""
    epochs: Positive = 1
    """passes over the corpus"""
    max_restarts: NonNegative = 3
    """new starts from the last checkpoint after the controller or the trainer died"""
    no_progress_seconds: Seconds = 600.0
    """the run is stopped, and what it waits for is named, after this long without progress"""
    on_advice: Literal["warn", "stop"] = "warn"
    """severe advice (zppo doctor): warn shows it, stop ends the run, resumable"""
    silent_teacher_windows: NonNegative = 3
    """a teacher that failed all tasks of so many windows in a row ends the run; 0: never"""


class DataConfig(Config, frozen=True, kw_only=True):
    """Sources of questions (docs/data.md) and the limits on them. `fields` maps our names to column
    names."""

    train: str
    """questions: JSONL, JSON, CSV, Parquet or Arrow file, data set folder,
    reasoning_gym:TASK?… (docs/data.md), or code of yours: ./file.py:name (docs/extending.md)"""
    heldout: str | None = None
    """questions for evaluation, from any such source; none of them may be in data.train"""
    fields: dict[Field, str] = field(default_factory=dict)
    """other column names, nested ones by their path, e.g. {answer: reward_model.ground_truth};
    system_prompt and grader of a row are read only where named"""
    grader: str = "math"
    """how responses are scored: math, exact, choice, or judge (the teacher compares answers)"""
    reward: list[RewardConfig] = field(default_factory=list)
    """in place of grader, a weighted sum: [{use: math, weight: 0.9}, {use: ./mine.py:name, …}]
    (docs/extending.md)"""
    media_folder: str | None = None
    """folder in which all pictures lie and from which their paths are read, and to which those
    inside a table are written; null: that of the question file (docs/pictures.md)"""
    min_pixels: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    """a picture of less area is shown enlarged to it; null: as it is (the model's processor may
    scale it further); the paper's evaluation: 262144"""
    max_pixels: Annotated[int, Meta(ge=1024, le=100_000_000)] | None = None
    """a picture of more area is shown reduced to it; null: as it is; the paper's evaluation:
    1310720"""
    max_bad_rows: NonNegative = 0
    """rows that may be left out (and listed in bad_rows.txt) before the file is refused"""
    templates: str | None = None
    """folder with .j2 files in place of the built-in ones (docs/templates.md)"""
    system_prompt: str | None = None
    """system message of every prompt, but of questions that bring their own"""
    max_prompt_tokens: Positive = 4096
    """longest plain prompt; reformulated prompts are bounded by the context alone"""


Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelConfig(Config, frozen=True, kw_only=True):
    """A model folder and how to decode from it."""

    model: str
    """model folder; with the engine openai the name of the served model"""
    dtype: Dtype = "bfloat16"
    """bfloat16 or float32, for sampling and training; float16 for teachers only"""
    sampling: ResponseSampling = ResponseSampling()
    """how it answers questions"""
    chat_template_kwargs: dict[str, TemplateValue] = field(default_factory=dict)
    """variables for the model's chat template, e.g. {enable_thinking: false}"""


class StudentConfig(ModelConfig, frozen=True, kw_only=True):
    """The model that is trained."""

    train_tower: bool = False
    """train what sees pictures as well; false: it stays as it is, and so does what engines have
    made of a picture"""
    sampling: StudentSampling = StudentSampling()
    """how it answers questions"""


class TeacherBudget(Config, frozen=True, kw_only=True):
    """What all teachers of a run may cost, `more_teachers` included."""

    tokens: Positive | None = None
    """tokens read and written, as far as they are reported; null: no limit"""
    requests: Positive | None = None
    """requests to teachers; null: no limit"""


class TeacherConfig(ModelConfig, frozen=True, kw_only=True):
    compression: Literal["teacher", "rule"] = "teacher"
    """who shortens the candidates shown in prompts: teacher, or rule (last lines and the answer)"""
    compression_sampling: CompressionSampling = CompressionSampling()
    """how the teacher writes them"""
    compression_chat_template_kwargs: dict[str, TemplateValue] | None = None
    """the same when it compresses, hints or judges; null: no thinking"""
    compression_max_lines: Positive = 5
    """most lines of a compressed candidate"""
    scoring: Literal["colocated", "remote"] = "colocated"
    """distillation: colocated (a copy of the teacher in the trainer) or remote (the teacher
    actors)"""
    score_top_k: Annotated[int, Meta(ge=1, le=4096)] = 32
    """remote: so many most probable tokens at each position, the rest as one mass"""
    budget: TeacherBudget = TeacherBudget()
    """what all teachers may cost, over all attempts; the run is saved and ends when it is spent"""


Batches: TypeAlias = Literal["windows", "filled"]
LAG = 2
"""What is made of a plain group may be trained so many times the steps later that tokens may be
old."""


class SchedulerConfig(Config, frozen=True, kw_only=True):
    """Windows, replay and the bound on staleness (policy versions)."""

    max_staleness: NonNegative = 1
    """a token may be at most this many policy versions old when trained; 0: synchronous"""
    batches: Batches | None = None
    """what a step trains: windows (each whole, in order) or filled (groups of any window as they
    finish, docs/filled.md); null: windows, as always at max_staleness 0"""
    new_questions: Positive = 384
    """|X_new|, questions from the corpus in each step"""
    rho_replay: Share = 0.25
    """replayed hard questions per new question, on top of them"""
    rho_aug: Share = 0.25
    """most reformulated prompts (BCQ and NCQ together) per new question"""
    rho_aug_max: Share | None = None
    """ours: rho_aug follows the number of hard questions up to this share; null: it is fixed"""
    buffer_capacity: Positive = 10_000
    """hard questions kept for replay; the oldest leaves first"""
    lease_seconds: Seconds = 300.0
    """a task goes to another actor when its holder made no progress for so long"""
    max_attempts: Positive = 5
    """tries of one task before the run stops"""

    @property
    def lag(self) -> int:
        """With filled batches: so many steps after its own a window is settled at the latest."""
        return LAG * (self.max_staleness + 1)


class OptimizerConfig(Config, frozen=True, kw_only=True):
    """AdamW as in Table 8."""

    learning_rate: PositiveFloat = 1e-6
    """step size"""
    beta1: Share = 0.9
    """decay of the first moment"""
    beta2: Share = 0.999
    """decay of the second moment"""
    epsilon: PositiveFloat = 1e-8
    """added to the root of the second moment"""
    weight_decay: NonNegativeFloat = 0.1
    """decoupled weight decay"""
    gradient_clip: PositiveFloat = 1.0
    """largest norm of the gradient"""
    state_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """how both moments are stored: bfloat16 or float32"""


class ActorConfig(Config, frozen=True, kw_only=True):
    """`count` processes of one role. `devices` are given out in turn; `engine_args` go to the
    engine as they are."""

    count: Annotated[int, Meta(ge=0, le=MOST_PROCESSES)] = 1
    """number of processes; none is started of a teacher that has no work"""
    engine: str = "transformers"
    """transformers, vllm (docs/vllm.md), openai (teachers: a server, docs/openai.md), simulated
    (scripted answers), or one of your own (docs/extending.md)"""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the engine, e.g. {max_sequences: 64, max_length: 4096}; {base_url:
    'http://127.0.0.1:8000/v1'} for openai"""
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    """given out in turn on each host: cpu, cuda, cuda:1, …"""
    hosts: list[str] = field(default_factory=lambda: [LOCALHOST])
    """names of cluster.hosts; each runs an equal part of the processes, in this order"""
    threads: Threads | None = None
    """CPU threads of each process; null: the cores are shared out evenly"""


class GraderConfig(Config, frozen=True, kw_only=True):
    count: Annotated[int, Meta(ge=1, le=MOST_PROCESSES)] = 1
    """number of processes"""
    timeout_seconds: Seconds = 5.0
    """processor time that scoring a response may take before it counts as wrong"""
    hosts: list[str] = field(default_factory=lambda: [LOCALHOST])
    """names of cluster.hosts; each runs an equal part of the processes"""


class TrainerConfig(Config, frozen=True, kw_only=True):
    device: str = "cpu"
    """cpu, cuda, cuda:1, …; the short form of devices"""
    devices: list[str] = field(default_factory=list)
    """one for each rank of a host, e.g. [cuda:0, cuda:1]"""
    hosts: list[str] = field(default_factory=lambda: [LOCALHOST])
    """names of cluster.hosts, beginning with the first one; each runs the same number of ranks"""
    ranks: Annotated[int, Meta(ge=1, le=MOST_PROCESSES)] | None = None
    """processes that share the student's weights and the work (docs/clusters.md); null: as many as
    devices, on each host"""
    collective_seconds: Seconds = 1800.0
    """longest that ranks wait for one another before the trainer ends"""
    port: Port | None = None
    """where ranks of several hosts meet, a TCP port of the first host; null: any free one"""
    threads: Threads | None = None
    """CPU threads of each rank; null: the cores are shared out evenly"""
    micro_batch_tokens: Positive = 16_384
    """padded tokens in one forward-backward pass"""
    measured_rollouts: Literal["all", "sample", "trained"] = "sample"
    """whose log-probs are read for the metrics: of `all`, of the `trained` alone, or of these and a
    weighted `sample` of the others (docs/losses.md)"""
    gradient_checkpointing: bool = False
    """compute activations twice to save memory"""

    @property
    def host_devices(self) -> list[str]:
        """The devices of the ranks on each host."""
        named, hosts = self.devices or [self.device], max(1, len(self.hosts))
        return named * max(1, (self.ranks or 1) // hosts) if len(named) == 1 else named

    @property
    def rank_devices(self) -> list[str]:
        """The device of each rank, host by host; `ranks` many, where the plan has not refused the
        settings."""
        return self.host_devices * len(self.hosts)

    @property
    def rank_hosts(self) -> list[str]:
        """The host of each rank, as `hosts` names it."""
        return [host for host in self.hosts for _ in self.host_devices]


class ActorsConfig(Config, frozen=True, kw_only=True):
    rollout: ActorConfig = ActorConfig()
    """Processes that sample the student"""
    teacher: ActorConfig = ActorConfig()
    """Processes that sample the teacher"""
    grader: GraderConfig = GraderConfig()
    """Processes that score responses"""
    trainer: TrainerConfig = TrainerConfig()
    """The process that trains the student"""
    start_seconds: Seconds = 300.0
    """an actor that starts and neither computes nor reads for so long is started again"""
    max_restarts: NonNegative = 10
    """restarts of one actor before the run gives up"""


class CheckpointConfig(Config, frozen=True, kw_only=True):
    every: Positive = 20
    """steps between checkpoints; the last step always has one"""
    keep: Positive = 2
    """newest checkpoints to keep"""


class EvaluationConfig(Config, frozen=True, kw_only=True):
    """Held-out accuracy before and after the run, and every `every` steps (null: only at the
    ends)."""

    every: Positive | None = None
    """and after each so many steps; null: only at the ends"""
    samples: Positive = 4
    """responses to each held-out question"""
    limit: Positive | None = None
    """at most so many held-out questions; null: all"""
    sampling: ResponseSampling | None = None
    """how they are sampled; null: as in training"""


class MoreTeacher(ModelConfig, frozen=True, kw_only=True):
    """A further teacher that draws responses, with its processes; the first one alone compresses,
    judges and scores."""

    actor: ActorConfig = ActorConfig()
    """its processes, as in actors.teacher"""


class Topology(Config, frozen=True, kw_only=True):
    data: DataConfig
    """Questions and prompts; relative paths are taken from the folder of this file"""
    student: StudentConfig
    """The model that is trained: a folder as written by save_pretrained or `hf download`"""
    teacher: TeacherConfig | None = None
    """The frozen teacher; leave the section out for methods that have no work for it"""
    more_teachers: list[MoreTeacher] = field(default_factory=list)
    """ours: more that draw responses, each {model, dtype, sampling, actor: {engine, …}}"""
    run: RunConfig = field(default_factory=RunConfig)
    """The run as a whole"""
    method: MethodConfig = field(default_factory=MethodConfig)
    """The method and the recipe that all methods share (paper: §3, Table 8, Fig. 6)"""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Windows, replay, and the bound on staleness"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW with a constant learning rate (Table 8)"""
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    """Processes: how many of each role, where, and with which engine"""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The hosts of the run (docs/clusters.md)"""
    transport: TransportConfig = field(default_factory=TransportConfig)
    """How the processes talk"""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """State from which `--resume` continues"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Accuracy on data.heldout, before and after the run"""
    sinks: SinksConfig = field(default_factory=SinksConfig)
    """Where metrics go besides metrics.jsonl"""
