"""From files to a trainer and back: the student's folder, and the trainer's share of a checkpoint.

The share is a `model/` folder that any Hugging Face tool opens (weights, configuration, and what
lay beside them in the student's folder, byte by byte: a tokenizer or a generation configuration
that can be loaded cannot always be written again), `trainer.safetensors` with the moments of AdamW,
and `trainer.json` with the step, the count of updates and the entropy coefficient if it moves. All
tensors are whole, so any number of ranks continues from what any other wrote. There is no generator
state: everything random in the trainer derives from the run's seed, the step and the count of
updates, so these files continue a run bit for bit (on one device, with deterministic kernels and a
fixed number of threads).
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from zppo.algorithm.methods import get_method
from zppo.config.served import served_student, teachers
from zppo.config.topology import Topology
from zppo.errors import UserError, first_line
from zppo.prompting.tokenization import check_same_vocabulary
from zppo.records.checkpoint import MODEL, write_file
from zppo.training import tensor_file
from zppo.training.entropy import EntropyState, initial_entropy
from zppo.training.loading import freeze_tower, load_folder
from zppo.training.optimizer import DTYPES, AdamW, Gradients
from zppo.training.policy import Policy
from zppo.training.ranks import ALONE, Ranks, gathered
from zppo.training.tensor_file import kind_of
from zppo.training.trainer import StepSettings, Trainer

MOMENTS, RECORD = "trainer.safetensors", "trainer.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".bpe", ".tiktoken", ".spm")
"""Endings of the files that tokenizers, processors and generation are configured with."""
WEIGHT_INDEX = ".index.json"


class TrainerRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`step`: steps trained, which is also the policy version. `updates`: optimizer updates
    applied. `entropy`: state of an entropy coefficient that moves."""

    format: int = 1
    step: int
    updates: int
    entropy: EntropyState | UnsetType = UNSET


def build_trainer(
    topology: Topology,
    clock: Callable[[], float],
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Load the student from `student.model`, or everything from a checkpoint folder; and the frozen
    models: a teacher that is colocated, the reference of a KL. Of several ranks each keeps its
    share of them; the checkpoint may be of any number of ranks.

    Raises UserError if a model cannot be loaded, the student's dtype cannot be trained, the teacher
    has another vocabulary, or the checkpoint does not fit.
    """
    settings = StepSettings.of(topology)
    source = str(checkpoint / MODEL) if checkpoint is not None else topology.student.model
    device = topology.actors.trainer.rank_devices[ranks.rank]
    student = topology.student
    policy = Policy(load_model(source, student.dtype, device, train_tower=student.train_tower))
    policy.open_eyes(source, train_tower=student.train_tower)
    if topology.actors.trainer.gradient_checkpointing:
        policy.recompute_layers()
    teacher, reference = load_teacher(topology, device), load_reference(topology, device)
    if ranks.count > 1:
        for one in (policy, teacher, reference):
            if one is not None:
                one.shard(ranks)
    parameters = policy.parameters()
    optimizer = AdamW(parameters, topology.optimizer, seed=topology.run.seed)
    entropy = initial_entropy(topology.method)
    if checkpoint is not None:
        record = load_optimizer(optimizer, checkpoint)
        entropy = entropy if record.entropy is UNSET else record.entropy
    return Trainer(
        policy,
        optimizer,
        Gradients(parameters, ranks),
        settings,
        clock,
        teacher=teacher,
        reference=reference,
        entropy=entropy,
        files=read_files(Path(source)),
        ranks=ranks,
    )


def load_teacher(topology: Topology, device: str) -> Policy | None:
    """The frozen teacher that a distillation compares the student with; None without one."""
    method, teacher = get_method(topology.method.name), topology.teacher
    if not method.needs_scores:
        return None
    if teacher is None:
        raise UserError(
            f"teacher: the method {method.name!r} needs a teacher, and the topology has none"
        )
    if teacher.scoring == "remote":
        return None
    check_same_vocabulary(served_student(topology), teachers(topology)[0])
    model = _load(teacher.model, teacher.dtype, device, "teacher.model")
    policy = Policy(model.requires_grad_(False), "teacher.model")
    policy.open_eyes(teacher.model)
    return policy


def load_reference(topology: Topology, device: str) -> Policy | None:
    """The student as the run began, frozen, whatever a checkpoint holds; None without a KL to
    it."""
    if topology.method.kl_coefficient == 0:
        return None
    student = topology.student
    model = load_model(student.model, student.dtype, device)
    policy = Policy(model.requires_grad_(False))
    policy.open_eyes(student.model)
    return policy


def load_model(source: str, dtype: str, device: str, *, train_tower: bool = False) -> Any:
    """Load a student in `dtype` onto `device`; its tower, if it has one, stays as it is unless it
    is to be trained."""
    if dtype not in DTYPES:
        raise UserError(
            f"student.dtype: {dtype} cannot be trained; expected one of {', '.join(DTYPES)}"
        )
    model = _load(source, dtype, device, "student.model")
    if not train_tower:
        freeze_tower(model)
    return model


def _load(source: str, dtype: str, device: str, where: str) -> Any:
    model = load_folder(source, dtype, where)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"actors.trainer.device: cannot use {device!r}: {first_line(error)}"
        ) from error


def read_files(folder: Path) -> dict[str, bytes]:
    """What lies in a model folder beside configuration and weights, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in KEPT_SUFFIXES
        and path.name != CONFIG
        and not path.name.endswith(WEIGHT_INDEX)
        and path.is_file()
    }


def save_model(trainer: Trainer, folder: Path, **how: Any) -> None:
    """Write the student as a model folder; `how` are arguments of `save_pretrained`."""
    model = trainer.policy.model
    # transformers refuses to write some generation configurations that it reads.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, **how)
    finally:
        model.generation_config = generation
    (folder / GENERATION).unlink(missing_ok=True)
    for name, content in trainer.files.items():
        write_file(folder / name, content)


def try_saving(trainer: Trainer, base: Path, source: str) -> None:
    """Write all of a model folder but its weights somewhere in `base`, and remove it.

    Raises UserError: what was loaded from `source` could not be saved in a checkpoint.
    """
    with tempfile.TemporaryDirectory(dir=base, prefix=".trial-") as folder:
        try:
            save_model(trainer, Path(folder), state_dict={})
        except Exception as error:
            reason = first_line(error)
            raise UserError(
                f"student.model: {source!r} can be loaded, but no checkpoint of it can be written "
                f"({reason})"
            ) from error


def save_share(
    trainer: Trainer, folder: Path, *, step: int, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the trainer's share of the checkpoint of `step` into `folder`; `checkpoint.commit`
    syncs the files.

    The first of several ranks does, and hands in the `weights` that it has published; the others
    must take part in `gather_moments`, which this does to its end whatever becomes of the files.
    """
    moments = gather_moments(trainer)
    try:
        _write_share(trainer, folder, moments, step=step, weights=weights)
    finally:
        exhaust(moments)


def gather_moments(trainer: Trainer) -> Iterator[Tensor]:
    """The moments of the optimizer, whole, one at a time, on the first rank; all ranks must go
    through to the end."""
    return (tensor for _, tensor in gathered(trainer.optimizer.tensors()))


def exhaust(gathered: Iterable[object]) -> None:
    """Take part in what is still to be gathered, and let it go."""
    deque(gathered, maxlen=0)


def _write_share(
    trainer: Trainer,
    folder: Path,
    moments: Iterable[Tensor],
    *,
    step: int,
    weights: Mapping[str, Tensor] | None,
) -> None:
    save_model(trainer, folder / MODEL, state_dict=None if weights is None else dict(weights))
    kinds = {name: kind_of(tensor) for name, tensor in trainer.optimizer.tensors()}
    tensor_file.write(folder / MOMENTS, kinds, moments)
    record = TrainerRecord(
        step=step, updates=trainer.optimizer.updates, entropy=trainer.entropy or UNSET
    )
    write_file(folder / RECORD, msgspec.json.encode(record))


def load_optimizer(optimizer: AdamW, folder: Path) -> TrainerRecord:
    """Take over the moments of a checkpoint and return its record. Raises UserError if they do not
    fit the model or the topology."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=TrainerRecord)
        with tensor_file.opened(folder / MOMENTS) as saved:
            optimizer.load(saved, updates=record.updates)
        return record
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the trainer cannot continue from this checkpoint: {error}"
        ) from error
