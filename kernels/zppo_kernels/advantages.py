"""Group advantages: rewards and a group index in, one advantage per rollout out (ZPPO Eqs. 1-6).

Invariant: a group whose rewards are all equal (max == min, never a test of the standard deviation,
which is 8e-9 and not 0 for a constant 0.1) gets exactly 0 in every mode.

Shapes: R rollouts; groups are named by any integers in [0, R), in any order and of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ._numba_advantages import advantages_rows
from .backends import backend_for
from .layout import accumulator_of, column

AdvantageMode = Literal["norm_without_zero", "norm_with_zero", "center_only", "grpo"]


@dataclass(frozen=True)
class AdvantageStatistics:
    """Count, mean and M2 (sum of squared deviations) of centred rewards; merging is exact and order
    does not matter."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def merge(self, other: AdvantageStatistics) -> AdvantageStatistics:
        """Statistics of both samples together (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        if count == 0.0:
            return AdvantageStatistics()
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        m2 = self.m2 + other.m2 + delta * delta * self.count * other.count / count
        return AdvantageStatistics(count, mean, m2)

    @property
    def std(self) -> float:
        """Population standard deviation (Eqs. 4-6 hold exactly with it); 0 for an empty sample."""
        return (self.m2 / self.count) ** 0.5 if self.count else 0.0


def advantage_statistics(
    rewards_R: Tensor, group_ids_R: Tensor, *, mode: AdvantageMode = "norm_without_zero"
) -> AdvantageStatistics:
    """Statistics of A' = r - group mean over the rollouts that `mode` normalises by (non-trivial
    groups, or all).

    Merge the results of several mini-batches or ranks and hand them to `group_advantages(...,
    statistics=...)`.
    """
    check_rewards(rewards_R, group_ids_R, mode)
    check_values(rewards_R, group_ids_R)
    centred_R, trivial_R, _ = _centred(rewards_R, group_ids_R)
    kept = centred_R if mode == "norm_with_zero" else centred_R[~trivial_R]
    if not kept.numel():
        return AdvantageStatistics()
    mean = kept.mean()
    return AdvantageStatistics(
        float(kept.numel()), float(mean), float((kept - mean).square().sum())
    )


def group_advantages(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    *,
    mode: AdvantageMode = "norm_without_zero",
    eps: float = 1e-6,
    statistics: AdvantageStatistics | None = None,
) -> Tensor:
    """Rewards [R] and group index int [R], in [0, R), -> advantages float32 [R] (Eqs. 1-3).

    mode: `norm_without_zero` (A' over the std of non-trivial groups), `norm_with_zero` (over the
    std of all),
        `center_only` (A' itself), `grpo` (A' over the group's own std, Eq. 1).
    statistics: mean and std of a wider scope (a whole step, all ranks) instead of those of these
    rollouts.

    A group of one rollout is trivial; no rollouts give no advantages. Raises ValueError for bad
    shapes, dtypes, modes and, on a CPU, for group ids out of range and rewards that are not finite,
    naming the group; on a GPU, which is not waited for, those give NaN. Sums are float64 whatever
    the dtype. One launch on a GPU, but for float64 rewards.
    """
    check_rewards(rewards_R, group_ids_R, mode)
    given = None if statistics is None else [statistics.mean, statistics.std]
    rewards_R = column(rewards_R, accumulator_of(rewards_R))
    return _group_advantages(rewards_R, column(group_ids_R, torch.int64), mode, eps, given)


@torch.library.custom_op("zppo_kernels::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor, group_ids: Tensor, mode: str, eps: float, given: list[float] | None
) -> Tensor:
    check_values(rewards, group_ids)
    backend = backend_for(rewards).name
    if backend == "triton":
        from .launch_advantages import launch_advantages

        return launch_advantages(rewards, group_ids, mode, eps, given)
    if backend == "numba":
        mean, std = given or (0.0, 0.0)
        advantages = np.empty(len(rewards), np.float32)
        code = get_args(AdvantageMode).index(mode)
        advantages_rows(
            rewards.numpy(), group_ids.numpy(), code, eps, given is not None, mean, std, advantages
        )
        return torch.from_numpy(advantages)
    statistics = None if given is None else AdvantageStatistics(1.0, given[0], given[1] ** 2)
    scope = {"mode": cast("AdvantageMode", mode), "eps": eps, "statistics": statistics}
    return group_advantages_reference(rewards, group_ids, **scope).float()  # type: ignore[arg-type]


@_group_advantages.register_fake
def _(
    rewards: Tensor, group_ids: Tensor, mode: str, eps: float, given: list[float] | None
) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


def group_advantages_reference(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    *,
    mode: AdvantageMode = "norm_without_zero",
    eps: float = 1e-6,
    statistics: AdvantageStatistics | None = None,
) -> Tensor:
    """The plain torch version, float64 throughout."""
    centred_R, trivial_R, std_R = _centred(rewards_R, group_ids_R)
    if mode == "grpo":
        return torch.where(trivial_R, 0.0, centred_R / (std_R + eps))
    if mode == "center_only":
        return torch.where(trivial_R, 0.0, centred_R)
    if statistics is None:
        statistics = advantage_statistics(rewards_R, group_ids_R, mode=mode)
    scaled_R = (centred_R - statistics.mean) / (statistics.std + eps)
    return torch.where(trivial_R, 0.0, scaled_R)


def _centred(rewards_R: Tensor, group_ids_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A' = r - group mean (Eq. 2), whether the group is trivial, and the group's population std,
    all per rollout."""
    # Of rewards near 100 that differ by 1e-3, float32 sums leave two digits.
    rewards_R, group_ids_R = rewards_R.double(), group_ids_R.long()
    zeros_G = rewards_R.new_zeros(len(rewards_R))
    count_G = zeros_G.index_add(0, group_ids_R, torch.ones_like(rewards_R)).clamp(min=1)
    mean_R = (zeros_G.index_add(0, group_ids_R, rewards_R) / count_G)[group_ids_R]
    highest_R = zeros_G.scatter_reduce(0, group_ids_R, rewards_R, "amax", include_self=False)[
        group_ids_R
    ]
    lowest_R = zeros_G.scatter_reduce(0, group_ids_R, rewards_R, "amin", include_self=False)[
        group_ids_R
    ]
    trivial_R = highest_R == lowest_R
    centred_R = torch.where(trivial_R, 0.0, rewards_R - mean_R)
    variance_G = zeros_G.index_add(0, group_ids_R, centred_R.square()) / count_G
    return centred_R, trivial_R, variance_G.sqrt()[group_ids_R]


def check_rewards(rewards_R: Tensor, group_ids_R: Tensor, mode: str) -> None:
    """Raise ValueError for shapes, dtypes, devices and modes."""
    if mode not in get_args(AdvantageMode):
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(AdvantageMode))}")
    if rewards_R.dim() != 1 or rewards_R.shape != group_ids_R.shape:
        raise ValueError(
            f"rewards have shape {tuple(rewards_R.shape)} and group ids "
            f"{tuple(group_ids_R.shape)}; expected [R] both"
        )
    if not rewards_R.is_floating_point() or group_ids_R.is_floating_point():
        raise ValueError(
            f"rewards are {rewards_R.dtype} and group ids {group_ids_R.dtype}; expected float and "
            "integer"
        )
    if rewards_R.device != group_ids_R.device:
        raise ValueError(f"rewards are on {rewards_R.device} but group ids on {group_ids_R.device}")


def check_values(rewards_R: Tensor, group_ids_R: Tensor) -> None:
    """On the CPU: ValueError for a group id out of range or a reward that is not finite."""
    if rewards_R.device.type != "cpu" or not len(rewards_R):
        return
    low, high = int(group_ids_R.min()), int(group_ids_R.max())
    if low < 0 or high >= len(rewards_R):
        raise ValueError(
            f"group ids run from {low} to {high}; expected 0 to {len(rewards_R) - 1}, below the "
            "number of rollouts"
        )
    finite_R = torch.isfinite(rewards_R)
    if not bool(finite_R.all()):
        row = int((~finite_R).nonzero()[0])
        raise ValueError(
            f"reward {row} of group {int(group_ids_R[row])} is {float(rewards_R[row])}; expected a "
            "finite number"
        )
