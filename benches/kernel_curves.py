"""The same small training run twice, with plain torch under autograd and with the fused loss: the
curves must coincide.

A two-layer model learns by the clipped loss to prefer rewarded tokens: every step samples
sequences, scores them, forms group advantages and makes two updates, so that ratios leave 1 and the
clip is at work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import zppo_kernels as kernels
from zppo_kernels.policy_inputs import prepare_rows
from zppo_kernels.policy_reference import policy_loss_reference

VOCABULARY, WIDTH, GROUPS, MEMBERS, LENGTH, UPDATES = 64, 32, 8, 8, 12, 2
SETTINGS = kernels.PolicyLossSettings(correction="none")
Loss = Callable[[Tensor, Tensor, Tensor, dict[str, object]], Tensor]


def fused_loss(
    hidden_TH: Tensor, weight_VH: Tensor, target_ids_T: Tensor, inputs: dict[str, object]
) -> Tensor:
    """The function under test."""
    return kernels.policy_loss_from_hidden(
        hidden_TH, weight_VH, target_ids_T, settings=SETTINGS, **inputs
    ).loss


def plain_loss(
    hidden_TH: Tensor, weight_VH: Tensor, target_ids_T: Tensor, inputs: dict[str, object]
) -> Tensor:
    """Materialised logits and autograd."""
    optional = dict.fromkeys(
        ("behaviour_log_probs_T", "reference_log_probs_T", "mask_T", "sequence_count")
    )
    rows = prepare_rows(target_ids_T, like=weight_VH, settings=SETTINGS, **(optional | inputs))
    return policy_loss_reference(hidden_TH @ weight_VH.T, rows, SETTINGS).loss


def train(loss_of: Loss, steps: int, seed: int = 0) -> list[float]:
    """Losses of all updates; everything random is seeded, so that two runs differ by their loss
    function alone."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)
    sequences = GROUPS * MEMBERS
    sequence_ids_T = torch.arange(sequences).repeat_interleave(LENGTH)
    generator = torch.Generator().manual_seed(seed + 1)
    curve = []
    for _ in range(steps):
        inputs_T = torch.randint(VOCABULARY, (sequences * LENGTH,), generator=generator)
        with torch.no_grad():
            probabilities_TV = torch.softmax(head(body(inputs_T)), -1)
            targets_T = torch.multinomial(probabilities_TV, 1, generator=generator).squeeze(1)
            proximal_T, _ = kernels.token_log_probs(body(inputs_T), head.weight, targets_T)
        hits_S = (targets_T < VOCABULARY // 4).view(sequences, LENGTH).float().mean(1)
        advantages_S = kernels.group_advantages(
            (hits_S > 0.3).float(), torch.arange(sequences) // MEMBERS
        )
        arguments = {
            "sequence_ids_T": sequence_ids_T,
            "advantages_S": advantages_S,
            "proximal_log_probs_T": proximal_T,
            "token_count": len(targets_T),
        }
        for _ in range(UPDATES):
            loss = loss_of(body(inputs_T), head.weight, targets_T, arguments)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    return curve


def both_curves(steps: int) -> dict[str, list[float]]:
    """Loss curves of the two runs."""
    return {"plain": train(plain_loss, steps), "fused": train(fused_loss, steps)}
