"""The ranks of a training step under FSDP2: `python fsdp_ranks.py WORLD FOLDER` imports everything
once and is forked into so many.

The loss is taken inside the forward of the root, which owns the embedding that is also the LM head.
Writes the gradients of all parameters and the summed loss to FOLDER/gradients.pt, and those that
the same step has in one process with plain torch come from `whole`.

Shapes: S sequences, L tokens of each, H hidden, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from zppo_kernels import PolicyLossSettings, policy_loss_from_hidden

S, L, H, V = 4, 5, 16, 33
SETTINGS = PolicyLossSettings(dual_clip=None, correction="none")
COUNT = S * L


class Policy(nn.Module):
    """Two blocks between an embedding and itself as the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return loss_of(hidden.flatten(0, 1), self.head.weight)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [S, L], targets [S, L], proximal log-probs [S, L], advantages [S]."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(V, (2, S, L), generator=generator)
    proximal = -3.5 + 0.4 * torch.randn(S, L, generator=generator)
    return inputs, targets, proximal, torch.tensor([1.0, -0.5, 0.0, 2.0])


def whole() -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the batch in one process, by plain torch: the reference."""
    inputs, targets, proximal, advantages = batch()

    def loss_of(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        log_probs_TV = (hidden_TH @ weight_VH.T).log_softmax(-1)
        ratio_T = (log_probs_TV.gather(1, targets.view(-1, 1)).squeeze(1) - proximal.view(-1)).exp()
        advantages_T = advantages.repeat_interleave(L)
        clipped_T = ratio_T.clamp(1 - SETTINGS.clip_low, 1 + SETTINGS.clip_high)
        return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T).sum() / COUNT

    policy = Policy()
    loss = policy(inputs, loss_of)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}  # type: ignore[misc]


def sharded(rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The same step with the sequences shared out over the ranks."""
    policy = Policy()
    mesh = init_device_mesh("cpu", (world,))
    for block in policy.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for module in (*policy.blocks, policy):
        module.set_gradient_divide_factor(1.0)  # the losses of ranks add
        module.set_force_sum_reduction_for_comms(True)
    inputs, targets, proximal, advantages = (tensor.chunk(world)[rank] for tensor in batch())

    def loss_of(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        assert not isinstance(weight_VH, DTensor), "the head is whole here"
        return policy_loss_from_hidden(
            hidden_TH,
            weight_VH,
            targets.flatten(),
            sequence_ids_T=torch.arange(len(advantages)).repeat_interleave(L),
            advantages_S=advantages,
            proximal_log_probs_T=proximal.flatten(),
            token_count=COUNT,
            settings=SETTINGS,
        ).loss

    loss = policy(inputs, loss_of)
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter.grad, DTensor) and parameter.grad.to_local().numel() < (
            parameter.numel()
        )
        gradients[name] = parameter.grad.full_tensor()
    return total, gradients


def main(world: int, folder: Path) -> int:
    """Be rank 0 and wait for the others; returns how many of them failed."""
    torch.set_num_threads(1)
    others: list[int] = []
    for rank in range(1, world):
        child = os.fork()
        if not child:
            work(rank, world, folder)
            return 0
        others.append(child)
    work(0, world, folder)
    return sum(os.waitpid(child, 0)[1] != 0 for child in others)


def work(rank: int, world: int, folder: Path) -> None:
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    found = sharded(rank, world)
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
