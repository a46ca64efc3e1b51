"""The ranks of a trainer: processes that each hold a share of the student and train on a share of
every mini-batch.

`Ranks` says which of them this process is, and adds up over all of them. Alone, a sum is the number
itself and nothing is sharded, so one rank is the trainer without ranks. Several are FSDP2
(`fully_shard`): between two passes each parameter is cut over its first dimension, and a pass
gathers one layer at a time.

Invariant: all ranks take part in the same collectives in the same order. Whatever decides about one
(a window, a number of passes, a loss, a norm) is therefore the same number on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from zppo.training.loading import tower_parameters
from zppo_kernels import combine_metrics

T = TypeVar("T")


class Root(nn.Module):
    """What is sharded as a whole: work done in its forward pass finds embedding, last norm and LM
    head gathered, and leaves their gradients where those of the layers are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


@dataclass(frozen=True)
class Ranks:
    """`rank` of the processes in `mesh`; without a mesh the only one. The first writes files."""

    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, after those of all ranks have been added to it."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def joined(self, values_T: Tensor, mine_T: Tensor) -> Tensor:
        """Values of which each rank has found those marked in its `mine_T`, no two the same; what
        none has found is as it was. Adding zeros changes no value."""
        if self.mesh is None:
            return values_T
        found = self.sum(torch.stack([torch.where(mine_T, values_T, 0.0), mine_T.float()]))
        return torch.where(found[1] > 0, found[0], values_T)

    def metrics(
        self, parts: list[dict[str, Tensor]], weights: list[float]
    ) -> list[dict[str, Tensor]]:
        """The metrics of all ranks' passes, where this rank's gave `parts`. A pass of weight 0
        adds nothing to a sum; a maximum that it repeats is one already."""
        if self.mesh is None or not parts:
            return parts
        weighed = [
            {name: value if _is_maximum(name) else value * weight for name, value in part.items()}
            for part, weight in zip(parts, weights, strict=True)
        ]
        own = combine_metrics(weighed)
        together = dict(own)
        for maxima, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
            names = [name for name in own if _is_maximum(name) == maxima]
            if names:
                values = torch.stack([own[name] for name in names])
                dist.all_reduce(values, operation, group=self.mesh.get_group())
                together |= zip(names, values.unbind(0), strict=True)
        return [together]

    def shard(self, model: nn.Module) -> Root:
        """Cut the parameters of `model` over the ranks, layer by layer; losses of ranks add up.

        Even the root is cut again after its pass: then every parameter outside of a pass is a
        shard, and no pass meets values that an update has overtaken. A tower that is not trained
        stays whole on every rank: passes with and without pictures then differ in no collective.
        Raises ValueError or NotImplementedError for a model that cannot be cut.
        """
        _check_one_dtype(model)
        root, kept = Root(model), _frozen_tower(model)
        layers = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer)
            and not kept.issuperset(module.parameters())
        ]
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        arguments: dict[str, Any] = {
            "mesh": self.mesh, "mp_policy": precision, "ignored_params": kept
        }  # fmt: skip
        for module in (*reversed(layers), root):
            fully_shard(module, reshard_after_forward=True, **arguments)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            # gloo has no other sum than the plain one.
            module.set_force_sum_reduction_for_comms(True)
        return root


ALONE = Ranks()


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, of the same memory; all of it where nothing is cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor as it is on no single rank; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors on the first rank, one after the other; on all others nothing, but
    they too must go through to the end.

    What they send is their own rows and no more, ahead of the first rank by as much as it likes;
    `whole` would put every tensor together on every rank.
    """
    sent: list[tuple[dist.Work | None, Tensor]] = []
    for name, tensor in tensors:
        if not isinstance(tensor, DTensor):
            if not dist.is_initialized() or dist.get_rank() == 0:
                yield name, tensor
            continue
        if tensor.device_mesh.get_local_rank() == 0:
            yield name, _received(tensor)
            continue
        share = _as_bytes(tensor.to_local().contiguous())
        if len(share):
            group = tensor.device_mesh.get_group()
            sent.append((dist.isend(share, group=group, group_dst=0), share))
    for work, _ in sent:
        if work is not None:
            work.wait()


def _received(tensor: DTensor) -> Tensor:
    """The rows of all ranks, on the first of them."""
    mesh, share = tensor.device_mesh, tensor.to_local()
    rows, group = -(-tensor.shape[0] // mesh.size()), mesh.get_group()
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=share.device)
    found[: len(share)] = share
    for rank in range(1, mesh.size()):
        part = found[rank * rows : (rank + 1) * rows]
        if len(part):
            dist.recv(_as_bytes(part), group=group, group_src=rank)
    return found


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; some collectives know few dtypes."""
    return tensor.reshape(-1).view(torch.uint8)


def first_row(tensor: Tensor) -> int:
    """Which row of the whole tensor this rank's share begins with."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, ranks = tensor.shape[0], tensor.device_mesh.size()
    return min(rows, tensor.device_mesh.get_local_rank() * -(-rows // ranks))


def cut_like(share: Tensor, parameter: Tensor) -> Tensor:
    """A rank's share of a tensor that is cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return share
    return DTensor.from_local(
        share,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _frozen_tower(model: Any) -> set[nn.Parameter]:
    return {one for _, one in tower_parameters(model) if not one.requires_grad}


def _check_one_dtype(model: nn.Module) -> None:
    """The trained parameters of a layer are one tensor while they travel, which FSDP2 finds out in
    the first pass only. Families that keep a few of them in float32 have two."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"its weights are {' and '.join(sorted(dtypes))}; with student.dtype float32 they are "
            "of one dtype, as shards must be"
        )


def _is_maximum(name: str) -> bool:
    return name.endswith("_max")
