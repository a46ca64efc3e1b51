"""From files to a trainer and back: the student's folder, and the trainer's share of a checkpoint.

The share is a `model/` folder that any Hugging Face tool opens (weights, configuration, tokenizer),
`trainer.safetensors` with the moments of AdamW, and `trainer.json` with the step and the count of
updates. There is no generator state: everything random in the trainer derives from the run's seed,
the step and the count of updates, so these files continue a run bit for bit (on one device, with
deterministic kernels and a fixed number of threads).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zppo.algorithm.methods import get_method
from zppo.config.served import served_student, teachers
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.prompting.tokenization import check_same_vocabulary
from zppo.records.checkpoint import MODEL, write_file
from zppo.training.optimizer import AdamW, Gradients
from zppo.training.policy import Policy
from zppo.training.trainer import StepSettings, Trainer

MOMENTS, RECORD = "trainer.safetensors", "trainer.json"
TRAINABLE_DTYPES = ("float32", "bfloat16")


class TrainerRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`step`: steps trained, which is also the policy version. `updates`: optimizer updates
    applied."""

    format: int = 1
    step: int
    updates: int


def build_trainer(
    topology: Topology, clock: Callable[[], float], checkpoint: Path | None = None
) -> Trainer:
    """Load the student from `student.model`, or everything from a checkpoint folder; and a teacher
    that is colocated.

    Raises UserError if a model cannot be loaded, the student's dtype cannot be trained, the teacher
    has another vocabulary, or the checkpoint does not fit.
    """
    settings = StepSettings.of(topology)
    source = str(checkpoint / MODEL) if checkpoint is not None else topology.student.model
    model = load_model(source, topology.student.dtype, topology.actors.trainer.device)
    policy = Policy(model)
    if topology.actors.trainer.gradient_checkpointing:
        policy.recompute_layers()
    parameters = policy.parameters()
    optimizer = AdamW(parameters, topology.optimizer, seed=topology.run.seed)
    if checkpoint is not None:
        load_optimizer(optimizer, checkpoint)
    return Trainer(
        policy, optimizer, Gradients(parameters), settings, clock, teacher=load_teacher(topology)
    )


def load_teacher(topology: Topology) -> Policy | None:
    """The frozen teacher that a distillation compares the student with, on the trainer's device;
    None without one."""
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
    model = _load(teacher.model, teacher.dtype, topology.actors.trainer.device, "teacher.model")
    return Policy(model.requires_grad_(False), "teacher.model")


def load_model(source: str, dtype: str, device: str) -> Any:
    """Load a student in `dtype` onto `device`."""
    if dtype not in TRAINABLE_DTYPES:
        raise UserError(
            f"student.dtype: {dtype} cannot be trained; expected one of "
            f"{', '.join(TRAINABLE_DTYPES)}"
        )
    return _load(source, dtype, device, "student.model")


def _load(source: str, dtype: str, device: str, where: str) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{where}: cannot load {source!r}: {str(error).splitlines()[0]}") from error
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"actors.trainer.device: cannot use {device!r}: {str(error).splitlines()[0]}"
        ) from error


def save_share(trainer: Trainer, folder: Path, *, step: int, tokenizer_source: str) -> None:
    """Write the trainer's share of the checkpoint of `step` into `folder`; `checkpoint.commit`
    syncs the files."""
    trainer.policy.model.save_pretrained(folder / MODEL)
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(folder / MODEL)
    save_file(dict(trainer.optimizer.tensors()), folder / MOMENTS)
    record = TrainerRecord(step=step, updates=trainer.optimizer.updates)
    write_file(folder / RECORD, msgspec.json.encode(record))


def load_optimizer(optimizer: AdamW, folder: Path) -> None:
    """Take over the moments of a checkpoint. Raises UserError if they do not fit the model or the
    topology."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=TrainerRecord)
        optimizer.load(load_file(folder / MOMENTS), updates=record.updates)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the trainer cannot continue from this checkpoint: {error}"
        ) from error
