"""The worker's end of a weight update: our shared-memory backend of vLLM's weight-transfer interface.

The actor verifies a publication while the engine goes on sampling; only then is the engine paused and this backend told
to load. The invariant: nothing of the model is touched before the file is mapped and known to be the very file that was
verified, so up to there a failure leaves the old weights serving. From there on vLLM's layerwise reload writes into the
tensors that compiled graphs hold, layer by layer, and a failure leaves a mixture: the actor must then end this engine.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from zppo_actors.engines.vllm_publication import UNTOUCHED, FileIdentity, Update
from zppo_actors.weights import DTYPES
from zppo_protocol.messages import TensorEntry


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`update` is an `Update` of `vllm_publication` as JSON."""

    update: str


class SharedMemoryWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads a whole policy from one file in shared memory, on CPUs as on GPUs, with any tensor parallelism."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Nothing yet: the layers are laid open only once the file is in hand."""

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Map the file, then load it. Raises ValueError or OSError that ends with `UNTOUCHED` if it is not the one."""
        update = msgspec.json.decode(update_info.update, type=Update)
        memory = map_file(update)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(tensors(memory, update.manifest.tensors))
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left: `receive_weights` takes a whole policy and closes the layers itself."""

    def shutdown(self) -> None:
        """Nothing to release: mappings end with the tensors that are views of them."""


def refresh_tied(model: nn.Module) -> None:
    """Renew what layers derive from a weight that came in under the name of another layer.

    vLLM's reload processes only the layer that a weight was loaded into. An output head that is tied to the embedding
    shares the tensor, but on a CPU it computes with a packed copy, which would be that of the old policy.
    """
    first: dict[int, nn.Module] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is None or first.setdefault(id(weight), layer) is layer:
            continue
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)


def map_file(update: Update) -> mmap.mmap:
    """Map the file of `update`. Raises ValueError if it is not the file that was verified."""
    path = update.manifest.path
    try:
        with Path(path).open("rb") as file:
            if FileIdentity.of(os.fstat(file.fileno())) != update.file:
                raise ValueError("the file was replaced or changed after it had been verified")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {UNTOUCHED}") from error


def tensors(memory: mmap.mmap, entries: list[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file by name, as views of `memory` on the CPU."""
    for entry in entries:
        count = entry.size // DTYPES[entry.dtype].itemsize
        flat = torch.frombuffer(memory, dtype=DTYPES[entry.dtype], count=count, offset=entry.start)
        yield entry.name, flat.view(entry.shape)
