"""How much memory a run needs, process by process: upper estimates that are made before anything
starts, or the least where the size of an engine's cache is left to vLLM and where an engine is the
user's own.

Legend of the terms, all in bytes: weights = parameters · width; gradients = parameters · 4, in
float32; optimizer = 2 · parameters · state width; activations ≈ 34 · tokens · hidden · layers at
two bytes a number (Korthikanti et al. 2022, §4, without the part of the attention that fused
attention never stores); key-value cache = sequences · length · layers with attention · 2 · heads ·
head width; recurrent states = sequences · their numbers · 4, whatever the dtype. A frozen model in
the trainer (a colocated teacher, the reference of the KL) adds its weights, one layer's activations
and its logits.

A tower that is not trained has weights alone. Of N ranks each has an N-th of weights, gradients,
optimizer and frozen models, but a frozen tower whole, and beside it what a pass gathers: the
embedding, the head where it is another matrix, and two layers, with gradients. While it loads, a
rank has each model whole, once.

A head that `zppo.training.head` does not take apart is seen by loading the model alone, so its
logits of all positions of a pass are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from zppo.algorithm.methods import get_method
from zppo.config.served import ServedModel, served_student, teacher_pool, teachers
from zppo.config.topology import (
    DTYPE_BYTES,
    OPENAI,
    TRANSFORMERS,
    VLLM,
    ModelConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
    TrainerConfig,
)
from zppo.plan.engines.own import DEFAULT_SEQUENCES
from zppo.plan.engines.vllm import CACHE_BYTES, sequence_bytes
from zppo.plan.model_folder import ModelFacts, inspect_model
from zppo.plan.processes import ProcessEntry, asked_teachers, trainer_scores

MIB = 1 << 20
LIBRARIES = {"controller": 200 * MIB, "grader": 300 * MIB, "weights": 100 * MIB}
"""What a process takes before it does anything; those that run a model take `MODEL_LIBRARIES`."""
MODEL_LIBRARIES = 450 * MIB
CLIENT_LIBRARIES = 200 * MIB
"""A teacher actor whose model runs behind a server."""
VLLM_LIBRARIES = 1800 * MIB
"""The three processes of a vLLM engine beside the actor's own libraries."""
SIMULATED = "simulated"
WITHOUT_FOLDER = (SIMULATED, OPENAI)
"""Engines of a teacher that read no model folder."""
RETAINED = 1.25
"""What the allocators of the trainer keep beyond what is in use."""
LOGITS_ROWS = 1024
"""Rows of logits that exist at once, in float32, in the trainer's chunked loss."""
SCORED_TOKENS, SCORED_ROWS = 8192, 256
"""Tokens of one scoring pass of an engine, and rows of its logits that exist at once, twice."""
PUBLISHED_MARGIN = 2
"""Policy versions in shared memory beyond max_staleness: the newest one and the one being
written, or the file of a released one that is kept for it."""


class Need(Struct, frozen=True, kw_only=True):
    """Bytes one process needs on its device, on each of them where there are several, and on the
    host: at most so many, or at least where its engine may take more."""

    device: int
    host: int
    device_least: bool = False
    host_least: bool = False


class Models(Struct, frozen=True, kw_only=True):
    """Facts of the models whose folder is read here, by the name of their pool; the student is
    always one of them."""

    by_pool: dict[str, ModelFacts]

    @property
    def student(self) -> ModelFacts:
        return self.by_pool["rollout"]

    @property
    def teacher(self) -> ModelFacts | None:
        """The first teacher."""
        return self.by_pool.get(teacher_pool(0))


def inspect_models(
    topology: Topology, inspect: Callable[[Path, str], ModelFacts] = inspect_model
) -> Models:
    """Read the model folders that the run will load; `inspect` says what there is of a folder that
    a setting names. Raises UserError."""
    read = [one for one in asked_teachers(topology) if one.actor.engine not in WITHOUT_FOLDER]
    if not read and trainer_scores(get_method(topology.method.name), topology.teacher):
        read = teachers(topology)[:1]
    return Models(
        by_pool={
            one.pool: inspect(one.folder, one.model_path)
            for one in [served_student(topology), *read]
        }
    )


def need(entry: ProcessEntry, topology: Topology, models: Models) -> Need:
    """Memory of one process."""
    method, trainer = get_method(topology.method.name), topology.actors.trainer
    if entry.role in ("trainer", "rank"):
        student = topology.student
        size = _trainer_bytes(trainer, student, topology.optimizer, models.student)
        loading = models.student.parameters * DTYPE_BYTES[student.dtype]
        if topology.method.kl_coefficient > 0:
            size += _frozen_bytes(trainer, student, models.student)
            loading *= 2
        teacher = topology.teacher
        if teacher is not None and models.teacher is not None and trainer_scores(method, teacher):
            size += _frozen_bytes(trainer, teacher, models.teacher)
            loading += models.teacher.parameters * DTYPE_BYTES[teacher.dtype]
        return _on(entry.device, max(size, loading))
    if entry.served is None:
        return Need(device=0, host=LIBRARIES[entry.role])
    if entry.served.actor.engine == OPENAI:
        return Need(device=0, host=CLIENT_LIBRARIES)
    facts, actor = models.by_pool.get(entry.pool), entry.served.actor
    if facts is None:
        return Need(device=0, host=MODEL_LIBRARIES)
    longest, scores = topology.data.max_prompt_tokens, method.needs_scores
    if actor.engine == VLLM:
        least = not actor.engine_args.get(CACHE_BYTES)
        return _on(entry.device, _vllm_bytes(entry, entry.served, facts), least=least)
    size = _engine_bytes(entry.served, facts, longest, scores=scores)
    return _on(entry.device, size, least=actor.engine not in (TRANSFORMERS, SIMULATED))


def shared_bytes(student: ModelConfig, facts: ModelFacts, max_staleness: int) -> int:
    """Published policies that lie in the runtime folder at once."""
    return (max_staleness + PUBLISHED_MARGIN) * facts.parameters * DTYPE_BYTES[student.dtype]


def trained_parameters(student: StudentConfig, facts: ModelFacts) -> int:
    """Those with gradients and moments."""
    return facts.parameters if student.train_tower else facts.parameters - facts.tower


def _on(device: str, size: int, *, least: bool = False) -> Need:
    if device == "cpu":
        return Need(device=0, host=size + MODEL_LIBRARIES, host_least=least)
    return Need(device=size, host=MODEL_LIBRARIES, device_least=least)


def _trainer_bytes(
    trainer: TrainerConfig, student: StudentConfig, adamw: OptimizerConfig, facts: ModelFacts
) -> int:
    width, ranks = DTYPE_BYTES[student.dtype], len(trainer.rank_devices)
    weights_and_gradients = width + DTYPE_BYTES["float32"]
    optimizer = 2 * DTYPE_BYTES[adamw.state_dtype]
    trained = trained_parameters(student, facts)
    state = trained * (weights_and_gradients + optimizer) // ranks
    state += (facts.parameters - trained) * width
    if ranks > 1:
        state += _gathered(facts) * weights_and_gradients
    per_layer = trainer.micro_batch_tokens * facts.hidden * width
    stored = 34 * per_layer // 2
    activations = (
        facts.layers * per_layer + stored
        if trainer.gradient_checkpointing
        else facts.layers * stored
    )
    logits = 2 * LOGITS_ROWS * facts.vocabulary * 4
    return math.ceil(RETAINED * (state + activations + logits))


def _frozen_bytes(trainer: TrainerConfig, model: ModelConfig, facts: ModelFacts) -> int:
    """A frozen model beside the student, a teacher or the reference of the KL: nothing is kept for
    a backward pass, so one layer is alive at a time."""
    width, ranks = DTYPE_BYTES[model.dtype], len(trainer.rank_devices)
    weights = (facts.parameters - facts.tower) // ranks + facts.tower
    weights += _gathered(facts) if ranks > 1 else 0
    activations = 34 * trainer.micro_batch_tokens * facts.hidden * width // 2
    logits = LOGITS_ROWS * facts.vocabulary * 4
    return math.ceil(RETAINED * (weights * width + activations + logits))


def _gathered(facts: ModelFacts) -> int:
    """Parameters that a pass of one of several ranks has whole at once: the embedding and head, a
    layer, and the next one on its way."""
    matrices = facts.vocabulary * facts.hidden * (1 if facts.tied else 2)
    layers = max(0, facts.parameters - facts.tower - matrices) // max(1, facts.layers)
    return min(facts.parameters, matrices + 2 * layers)


def _engine_bytes(
    served: ServedModel, facts: ModelFacts, max_prompt_tokens: int, *, scores: bool
) -> int:
    """`scores`: the method asks a remote teacher for its distribution."""
    model, actor = served.model, served.actor
    if actor.engine != TRANSFORMERS:  # simulated, or of the user's own, of which nothing is known
        return 0
    width = DTYPE_BYTES[model.dtype]
    sequences = int(actor.engine_args.get("max_sequences", DEFAULT_SEQUENCES))
    longest = max_prompt_tokens + model.sampling.max_new_tokens
    length = min(facts.slots_context, int(actor.engine_args.get("max_length") or longest))
    attending = facts.layers - facts.without_keys
    keys_and_values = length * attending * 2 * facts.kv_heads * facts.head_dim * width
    cache = sequences * (keys_and_values + facts.states * DTYPE_BYTES["float32"])
    scoring = _scoring_bytes(model, facts) if scores else 0
    return facts.parameters * width + cache + sequences * facts.vocabulary * 4 + scoring


def _scoring_bytes(model: ModelConfig, facts: ModelFacts) -> int:
    """One scoring pass of a remote teacher: one layer's activations and a chunk of logits."""
    if not (isinstance(model, TeacherConfig) and model.scoring == "remote"):
        return 0
    return (
        34 * SCORED_TOKENS * facts.hidden * DTYPE_BYTES[model.dtype] // 2
        + 2 * SCORED_ROWS * facts.vocabulary * 4
    )


def _vllm_bytes(entry: ProcessEntry, served: ServedModel, facts: ModelFacts) -> int:
    """The least that vLLM must have on each of its cards: it fits its cache to what is free, from
    one full sequence on. Cards share weights and keys and values. On a CPU it packs the weights
    into a second copy."""
    arguments, dtype = served.actor.engine_args, served.model.dtype
    cache = arguments.get(CACHE_BYTES)  # of each card
    if not cache:
        cache = sequence_bytes(arguments, facts, dtype, max(1, len(entry.cards)))
    weights = facts.quantised_bytes or facts.parameters * DTYPE_BYTES[dtype]
    if entry.device == "cpu":
        return 2 * weights + int(cache) + VLLM_LIBRARIES
    return weights // len(entry.cards) + int(cache) + VLLM_LIBRARIES
