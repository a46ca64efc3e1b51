"""Who runs in `benches/kernels.py`: this package, plain torch, torch.compile, and the peers where
they are installed.

Each contestant turns a problem into one callable that runs forward and backward once. All compute
the same loss: token-level ratio, asymmetric clip, dual clip, mean over all tokens; peers that
cannot skip dead rows compute them.

Shapes: N rows, H hidden, V vocabulary, S sequences of L rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import zppo_kernels as kernels

LENGTH = 64
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0
Run = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """Tensors of one size; the first `live` share of the sequences has an advantage."""

    hidden_NH: Tensor
    weight_VH: Tensor
    target_ids_N: Tensor
    advantages_S: Tensor
    sequence_ids_N: Tensor
    proximal_N: Tensor

    @property
    def rows(self) -> int:
        """N, a multiple of LENGTH."""
        return len(self.target_ids_N)

    def logits(self) -> Tensor:
        """Materialised and detached, as a leaf that wants a gradient."""
        return (self.hidden_NH.detach() @ self.weight_VH.detach().T).requires_grad_()


def make_problem(rows: int, hidden: int, vocabulary: int, live: float, device: str) -> Problem:
    """Seeded; bf16 on a GPU, float32 on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hidden_NH, weight_VH = normal(rows, hidden), normal(vocabulary, hidden) / hidden**0.5
    target_ids_N = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    sequences = rows // LENGTH
    advantages_S = torch.randn(sequences, generator=generator, device=device)
    advantages_S[int(live * sequences) :] = 0.0
    proximal_N, _ = kernels.token_log_probs(hidden_NH, weight_VH, target_ids_N)
    sequence_ids_N = torch.arange(rows, device=device) // LENGTH
    return Problem(
        hidden_NH.requires_grad_(),
        weight_VH.requires_grad_(),
        target_ids_N,
        advantages_S,
        sequence_ids_N,
        proximal_N,
    )


def surrogate(log_probs_N: Tensor, problem: Problem) -> Tensor:
    """The loss in plain torch, from log-probs."""
    advantages_N = problem.advantages_S[problem.sequence_ids_N]
    ratio_N = (log_probs_N - problem.proximal_N).exp()
    clipped_N = ratio_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    loss_N = torch.maximum(-advantages_N * ratio_N, -advantages_N * clipped_N)
    capped_N = torch.minimum(loss_N, -advantages_N * DUAL_CLIP)
    return torch.where(advantages_N < 0, capped_N, loss_N).sum() / problem.rows


def _plain(logits_NV: Tensor, problem: Problem) -> Tensor:
    """Log-softmax, gather, entropy for the metrics, loss: what a trainer without kernels does."""
    log_probs_NV = torch.log_softmax(logits_NV.float(), -1)
    with torch.no_grad():
        entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
    picked_N = log_probs_NV.gather(1, problem.target_ids_N.unsqueeze(1)).squeeze(1)
    return surrogate(picked_N, problem) + 0.0 * entropy_N.sum()


def _zppo_arguments(problem: Problem) -> dict[str, object]:
    return {
        "sequence_ids_T": problem.sequence_ids_N,
        "advantages_S": problem.advantages_S,
        "proximal_log_probs_T": problem.proximal_N,
        "token_count": problem.rows,
    }


def hidden_zppo(problem: Problem) -> Run:
    """This package, from hidden states."""
    arguments = _zppo_arguments(problem)
    return lambda: kernels.policy_loss_from_hidden(
        problem.hidden_NH, problem.weight_VH, problem.target_ids_N, **arguments
    ).loss.backward()


def hidden_torch(problem: Problem) -> Run:
    """Plain torch, eager."""
    return lambda: _plain(problem.hidden_NH @ problem.weight_VH.T, problem).backward()


def hidden_compiled(problem: Problem) -> Run:
    """Plain torch under torch.compile."""
    loss = torch.compile(lambda hidden, weight: _plain(hidden @ weight.T, problem))
    return lambda: loss(problem.hidden_NH, problem.weight_VH).backward()


def hidden_trl(problem: Problem) -> Run:
    """TRL's own log-prob and entropy of the logits, its loss written out."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run() -> None:
        logits_NV = problem.hidden_NH @ problem.weight_VH.T
        log_probs_N = selective_log_softmax(logits_NV, problem.target_ids_N)
        with torch.no_grad():
            entropy_from_logits(logits_NV)
        surrogate(log_probs_N, problem).backward()

    return run


def hidden_liger(problem: Problem) -> Run:
    """Liger's chunked GRPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=problem.hidden_NH.is_cuda, use_ref_model=False, epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH, loss_type="dapo", temperature=1.0, delta=DUAL_CLIP,
    )  # fmt: skip
    shape = (problem.rows // LENGTH, LENGTH)
    mask = torch.ones(shape, dtype=torch.int32, device=problem.hidden_NH.device)
    targets, proximal = problem.target_ids_N.view(shape), problem.proximal_N.view(shape)
    return lambda: module(
        problem.hidden_NH.view(*shape, -1),
        problem.weight_VH,
        targets,
        mask,
        problem.advantages_S,
        old_per_token_logps=proximal,
    )[0].backward()


def logits_zppo(problem: Problem) -> Run:
    """This package, from logits, gradient in a new tensor so that the run can be repeated."""
    logits_NV, arguments = problem.logits(), _zppo_arguments(problem)
    return lambda: kernels.policy_loss_from_logits(
        logits_NV, problem.target_ids_N, **arguments
    ).loss.backward()


def logits_torch(problem: Problem) -> Run:
    """Plain torch, eager."""
    logits_NV = problem.logits()
    return lambda: _plain(logits_NV, problem).backward()


def logits_compiled(problem: Problem) -> Run:
    """Plain torch under torch.compile."""
    logits_NV, loss = problem.logits(), torch.compile(_plain)
    return lambda: loss(logits_NV, problem).backward()


def logits_liger(problem: Problem) -> Run:
    """Liger's Triton GRPO loss."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (problem.rows // LENGTH, LENGTH)
    hidden_SLH = problem.hidden_NH.detach().view(*shape, -1)
    padded_SLH = torch.nn.functional.pad(hidden_SLH, (0, 0, 0, 1))
    logits_SLV = (padded_SLH @ problem.weight_VH.detach().T).requires_grad_()
    targets, proximal = problem.target_ids_N.view(shape), problem.proximal_N.view(shape)
    return lambda: triton_grpo_loss(
        logits_SLV, proximal, None, targets, problem.advantages_S, temperature=1.0, beta=0.0,
        eps_low=CLIP_LOW, eps_high=CLIP_HIGH, inplace=False, delta=DUAL_CLIP, reduce=True,
    )[0].backward()  # fmt: skip


def log_probs_zppo(problem: Problem) -> Run:
    """Log-probs and entropies from hidden states, no gradient."""
    return lambda: kernels.token_log_probs(
        problem.hidden_NH, problem.weight_VH, problem.target_ids_N
    )


@torch.no_grad()
def _plain_log_probs(problem: Problem) -> tuple[Tensor, Tensor]:
    log_probs_NV = torch.log_softmax((problem.hidden_NH @ problem.weight_VH.T).float(), -1)
    picked_N = log_probs_NV.gather(1, problem.target_ids_N.unsqueeze(1)).squeeze(1)
    return picked_N, -(log_probs_NV.exp() * log_probs_NV).sum(-1)


def log_probs_torch(problem: Problem) -> Run:
    """The same in plain torch."""
    return lambda: _plain_log_probs(problem)


def advantages_zppo(problem: Problem) -> Run:
    """Group advantages of 4,096 rewards in groups of 8."""
    rewards_R, groups_R = _rewards(problem)
    return lambda: kernels.group_advantages(rewards_R, groups_R)


def advantages_torch(problem: Problem) -> Run:
    """The same in plain torch."""
    from zppo_kernels.advantages import group_advantages_reference

    rewards_R, groups_R = _rewards(problem)
    return lambda: group_advantages_reference(rewards_R, groups_R)


def _rewards(problem: Problem) -> tuple[Tensor, Tensor]:
    device = problem.hidden_NH.device
    rewards_R = (
        torch.rand(4096, generator=torch.Generator(device).manual_seed(1), device=device) > 0.6
    ).float()
    return rewards_R, torch.arange(4096, device=device) // 8


# suite -> name -> contestant; the first of a suite is this package.
SUITES: dict[str, dict[str, Callable[[Problem], Run]]] = {
    "policy loss from hidden states": {
        "zppo": hidden_zppo,
        "torch": hidden_torch,
        "torch.compile": hidden_compiled,
        "Liger chunked": hidden_liger,
        "TRL": hidden_trl,
    },
    "policy loss from logits": {
        "zppo": logits_zppo,
        "torch": logits_torch,
        "torch.compile": logits_compiled,
        "Liger Triton": logits_liger,
    },
    "log-probs from hidden states": {"zppo": log_probs_zppo, "torch": log_probs_torch},
    "group advantages": {"zppo": advantages_zppo, "torch": advantages_torch},
}
GPU_ONLY = {"Liger Triton"}
