"""Group advantages: rewards and a group index in, one advantage per rollout out (ZPPO Eqs. 1-6).

Invariant: a group whose rewards are all equal (max == min, never a test of the standard deviation,
which is 8e-9 and not 0 for a constant 0.1) gets exactly 0 in every mode.

With A' = r - group mean (Eq. 2) of a group of n rollouts, the modes are:

- `norm_without_zero`, `norm_with_zero`: A' standardised over all rollouts of non-trivial groups, or
  of all groups (Eqs. 2-3);
- `center_only`: A' itself, as in Dr. GRPO (TRL `scale_rewards="none"`, verl
  `norm_adv_by_std_in_grpo: False`);
- `grpo`: A' over the group's population std (Eq. 1); `grpo_bessel`: over its sample std, n - 1 in
  the denominator (verl `grpo`, TRL `scale_rewards="group"`);
- `rloo`: r minus the mean of the *other* n - 1 rewards, which is A' n / (n - 1) (Ahmadian et al.
  2024; verl `rloo`);
- `batch`: A' over the sample std of all rewards, not centred (TRL `scale_rewards="batch"`).

Shapes: R rollouts, K rewards of each; groups are named by any integers in [0, R), in any order and
of any size.
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

AdvantageMode = Literal[
    "norm_without_zero", "norm_with_zero", "center_only", "grpo", "grpo_bessel", "rloo", "batch"
]
WITHIN_GROUP: tuple[AdvantageMode, ...] = ("center_only", "grpo", "grpo_bessel", "rloo")
"""The modes that see one group at a time, so that no wider scope changes them."""


@dataclass(frozen=True)
class AdvantageStatistics:
    """Count, mean and M2 (sum of squared deviations) of what a mode scales by; merging is exact and
    order does not matter."""

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

    @property
    def sample_std(self) -> float:
        """Standard deviation with count - 1 in the denominator; 0 for a sample of one or none."""
        return (self.m2 / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def shift_and_scale(self, mode: AdvantageMode) -> list[float]:
        """What `mode` subtracts from A' and what it divides by."""
        return [0.0, self.sample_std] if mode == "batch" else [self.mean, self.std]


def advantage_statistics(
    rewards_R: Tensor, group_ids_R: Tensor, *, mode: AdvantageMode = "norm_without_zero"
) -> AdvantageStatistics:
    """Statistics of what `mode` scales by: A' over the rollouts of non-trivial groups (or of all),
    or the rewards themselves (`batch`).

    Merge the results of several mini-batches or ranks and hand them to `group_advantages(...,
    statistics=...)`.
    """
    check_rewards(rewards_R, group_ids_R, mode)
    check_values(rewards_R, group_ids_R)
    centred_R, trivial_R, _ = _centred(rewards_R, group_ids_R)
    kept = centred_R if mode == "norm_with_zero" else centred_R[~trivial_R]
    if mode == "batch":
        kept = rewards_R.double()
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

    mode: see the top of this file. eps: added to every std that is divided by.
    statistics: those of a wider scope (a whole step, all ranks) instead of those of these rollouts;
    modes within a group do not look at them.

    A group of one rollout is trivial; no rollouts give no advantages. Raises ValueError for bad
    shapes, dtypes, modes and, on a CPU, for group ids out of range and rewards that are not finite,
    naming the group; on a GPU, which is not waited for, those give NaN. Sums are float64 whatever
    the dtype. One launch on a GPU, but for float64 rewards.
    """
    check_rewards(rewards_R, group_ids_R, mode)
    given = None if statistics is None else statistics.shift_and_scale(mode)
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
    return _scaled(rewards, group_ids, cast("AdvantageMode", mode), eps, given).float()


@_group_advantages.register_fake
def _(
    rewards: Tensor, group_ids: Tensor, mode: str, eps: float, given: list[float] | None
) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


def decoupled_advantages(
    rewards_RK: Tensor,
    weights_K: Tensor,
    group_ids_R: Tensor,
    *,
    mode: AdvantageMode = "grpo_bessel",
    eps: float = 1e-6,
) -> Tensor:
    """K rewards of each rollout [R, K] and their weights [K] -> advantages float32 [R] (GDPO, Liu
    et al. 2026).

    Each reward is normalised within its group by `mode`, which is one of WITHIN_GROUP; their
    weighted sum is divided by its sample std over all rollouts given (it needs no centring: the sum
    over a group is 0). So a reward of small scale counts as much as one of large scale, which a sum
    of the rewards would drown. TRL `multi_objective_aggregation="normalize_then_sum"`; verl `gdpo`,
    which weighs rollouts by their length in the last step. Raises ValueError as `group_advantages`
    does, and for any other mode or weights that are no finite numbers.
    """
    if mode not in WITHIN_GROUP:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(WITHIN_GROUP)}")
    if rewards_RK.dim() != 2 or tuple(weights_K.shape) != tuple(rewards_RK.shape[1:]):
        raise ValueError(
            f"rewards have shape {tuple(rewards_RK.shape)} and weights {tuple(weights_K.shape)}; "
            "expected [R, K] and [K]"
        )
    if weights_K.device.type == "cpu" and not bool(torch.isfinite(weights_K).all()):
        raise ValueError(f"weights are {weights_K.tolist()}; expected finite numbers")
    sum_R = torch.zeros(len(rewards_RK), dtype=torch.float64, device=rewards_RK.device)
    for rewards_R, weight in zip(rewards_RK.unbind(1), weights_K.double().unbind(0), strict=True):
        sum_R += weight * group_advantages(rewards_R, group_ids_R, mode=mode, eps=eps)
    scale = (sum_R.square().sum() / max(len(sum_R) - 1, 1)).sqrt()
    return (sum_R / (scale + eps)).float()


def group_advantages_reference(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    *,
    mode: AdvantageMode = "norm_without_zero",
    eps: float = 1e-6,
    statistics: AdvantageStatistics | None = None,
) -> Tensor:
    """The plain torch version, float64 throughout."""
    given = None if statistics is None else statistics.shift_and_scale(mode)
    return _scaled(rewards_R, group_ids_R, mode, eps, given)


def _scaled(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    mode: AdvantageMode,
    eps: float,
    given: list[float] | None,
) -> Tensor:
    centred_R, trivial_R, count_R = _centred(rewards_R, group_ids_R)
    if mode == "center_only":
        return centred_R
    if mode == "rloo":
        return centred_R * count_R / (count_R - 1).clamp(min=1)
    if mode in ("grpo", "grpo_bessel"):
        squares_G = centred_R.new_zeros(len(centred_R)).index_add(
            0, group_ids_R.long(), centred_R.square()
        )
        counted_R = count_R - 1 if mode == "grpo_bessel" else count_R
        std_R = (squares_G[group_ids_R.long()] / counted_R.clamp(min=1)).sqrt()
        return torch.where(trivial_R, 0.0, centred_R / (std_R + eps))
    if given is None:
        statistics = advantage_statistics(rewards_R, group_ids_R, mode=mode)
        given = statistics.shift_and_scale(mode)
    shift, scale = given
    return torch.where(trivial_R, 0.0, (centred_R - shift) / (scale + eps))


def _centred(rewards_R: Tensor, group_ids_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A' = r - group mean (Eq. 2), exactly 0 in trivial groups; whether the group is trivial; and
    the number of its rollouts; all per rollout."""
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
    return centred_R, trivial_R, count_G[group_ids_R]


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
