"""The one launch of `triton_advantages.advantages_kernel`; imported only where Triton is used."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import trusted
from .rows_triton import on_device
from .triton_advantages import BOUND_LINES, SUM_LINES, advantages_kernel

BLOCK = 1024


def launch_advantages(
    rewards_R: Tensor, group_ids_R: Tensor, mode: str, eps: float, given: list[float] | None
) -> Tensor:
    """Rewards float32 [R], group ids [R] -> advantages float32 [R]."""
    rows = len(rewards_R)
    advantages_R = torch.empty_like(rewards_R)
    sums = torch.empty(SUM_LINES * rows, dtype=torch.float64, device=rewards_R.device)
    bounds = torch.empty(BOUND_LINES * rows, dtype=torch.float32, device=rewards_R.device)
    scope = (
        sums if given is None else torch.tensor(given, dtype=torch.float64, device=rewards_R.device)
    )
    if rows:
        with on_device(rewards_R):
            advantages_kernel[(1,)](
                *trusted(rewards_R, group_ids_R, advantages_R, sums, bounds, scope), rows,
                EPS=eps, MODE=mode, IS_GIVEN=given is not None, BLOCK=BLOCK, num_warps=16,
            )  # fmt: skip
    return advantages_R
