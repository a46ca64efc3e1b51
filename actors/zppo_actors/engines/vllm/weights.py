"""The worker's end of a weight update: our shared-memory backend of vLLM's weight-transfer
interface.

An update comes in two parts. `prepare` starts a thread that maps the file, makes sure that it is
the very file that the actor verified, and on a CPU lays the new weights out beside the model, while
the worker goes on with its steps. `commit` comes when the engine is paused, and puts them in place.
The invariant: nothing of the model is touched before `commit`, so up to there a failure leaves the
old weights serving. A failure in `commit` leaves a mixture: the actor must then end this engine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from zppo_actors.engines.vllm.publication import PREPARING, READY, FileIdentity, Update
from zppo_actors.engines.vllm.reload import adopt, can_shadow, load, make_shadow
from zppo_actors.weights.recycling import opened
from zppo_actors.weights.shared_memory import DTYPES
from zppo_protocol.values import TensorEntry

POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux: read all pages of a mapping now."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`prepare` is an `Update` of `vllm_publication` as JSON; without it the update that was
    prepared is committed."""

    prepare: str | None = None


class Prepared(NamedTuple):
    """An update that is ready: its mapped file, and on a CPU the shadow that holds its weights."""

    update: Update
    memory: mmap.mmap
    shadow: nn.Module | None


class SharedMemoryWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads a whole policy from one file in shared memory, on CPUs as on GPUs, with any tensor
    parallelism."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    preparation: Future[Prepared] | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Nothing yet: an update begins when its file is named."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Start to prepare an update, or put the prepared one in place."""
        if update_info.prepare is None:
            self._commit()
            return
        update = msgspec.json.decode(update_info.prepare, type=Update)
        helper = ThreadPoolExecutor(1, "zppo-weights")
        self.preparation = helper.submit(prepare, update, self.model, self.model_config)
        helper.shutdown(wait=False)

    def _commit(self) -> None:
        if self.preparation is None:
            raise RuntimeError("a commit without an update that was prepared")
        update, memory, shadow = self.preparation.result()
        if shadow is None:
            load(self.model, self.model_config, tensors(memory, update.manifest.tensors))
        else:
            adopt(self.model, shadow)

    def finish_weight_update(self) -> None:
        """Let go of the file and the shadow. A whole policy comes at once, so there is nothing to
        complete."""
        self.preparation = None

    def shutdown(self) -> None:
        """Nothing to release: mappings end with the tensors that are views of them."""


class WorkerExtension:
    """What vLLM adds to its worker class, so that the actor can ask how far an update is."""

    weight_transfer_engine: SharedMemoryWeightTransferEngine

    def zppo_preparation(self) -> str:
        """`PREPARING`, `READY`, or why the update cannot be loaded."""
        preparation = self.weight_transfer_engine.preparation
        if preparation is None:
            return "no update was begun"
        if not preparation.done():
            return PREPARING
        error = preparation.exception()
        return READY if error is None else str(error) or type(error).__name__


def prepare(update: Update, model: nn.Module, model_config: object) -> Prepared:
    """Do what needs no pause; runs in a thread beside the worker's steps. Raises ValueError for
    another file."""
    memory = map_file(update)
    if not can_shadow(model):
        return Prepared(update, memory, None)
    shadow = make_shadow(model)
    load(shadow, model_config, tensors(memory, update.manifest.tensors))
    return Prepared(update, memory, shadow)


def map_file(update: Update) -> mmap.mmap:
    """Map the file of `update` and read it in. Raises ValueError if it is not the file that was
    verified."""
    path = update.manifest.path
    try:
        with opened(Path(path)) as file:
            if FileIdentity.of(os.fstat(file.fileno())) != update.file:
                raise ValueError("the file was replaced or changed after it had been verified")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    with contextlib.suppress(
        OSError, ValueError
    ):  # older kernels cannot; then pages come as they are read
        memory.madvise(POPULATE_READ)
    return memory


def tensors(memory: mmap.mmap, entries: list[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file by name, as views of `memory` on the CPU."""
    for entry in entries:
        count = entry.size // DTYPES[entry.dtype].itemsize
        flat = torch.frombuffer(memory, dtype=DTYPES[entry.dtype], count=count, offset=entry.start)
        yield entry.name, flat.view(entry.shape)
