"""The rollouts of one window as flat arrays, cut into mini-batches of whole groups.

Invariants: every token of the window belongs to exactly one sequence, every sequence to exactly one
mini-batch; no token is older than `max_staleness` policy versions. The scheduler keeps that bound
by pacing; it is checked again here. Tokens that a frozen model wrote have no age: they count as
fresh.

Shape legend: G groups, S sequences (rollouts) of the window, T response tokens of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TrainGroup
from zppo_protocol.values import FROZEN


class StalenessError(RuntimeError):
    """A token is older than the bound allows: a bug in the pacing, which stops the run."""


@dataclass(frozen=True)
class Rollouts:
    """All sequences of a window. `behaviour_T`, `frozen_T` and `token_ids_T` lie on the device, the
    bookkeeping on the host. `frozen_T` marks tokens that no policy sampled; their `behaviour_T`
    says nothing."""

    step: int
    groups: list[TrainGroup]
    prompts_G: list[np.ndarray]
    host_ids_T: np.ndarray
    token_ids_T: Tensor
    behaviour_T: Tensor
    frozen_T: Tensor
    starts_S: np.ndarray
    lengths_S: np.ndarray
    group_S: np.ndarray
    rewards_S: Tensor
    staleness_T: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.lengths_S)

    @property
    def tokens(self) -> int:
        return len(self.host_ids_T)

    @property
    def device(self) -> torch.device:
        return self.token_ids_T.device


def assemble(window: TrainWindow, *, max_staleness: int, device: torch.device) -> Rollouts:
    """Lay the window's groups end to end. Raises StalenessError, and ValueError for an empty
    prompt."""
    groups = window.groups
    lengths = [np.diff(group.samples.offsets) for group in groups]
    host_ids_T = _concatenate([group.samples.token_ids for group in groups], np.int64)
    lengths_S = _concatenate(lengths, np.int64)
    return Rollouts(
        step=window.step,
        groups=groups,
        prompts_G=[_prompt(group) for group in groups],
        host_ids_T=host_ids_T,
        token_ids_T=torch.from_numpy(host_ids_T).to(device),
        behaviour_T=torch.from_numpy(
            _concatenate([g.samples.log_probs for g in groups], np.float32)
        ).to(device),
        frozen_T=torch.from_numpy(
            _concatenate([g.samples.versions_T == FROZEN for g in groups], np.bool_)
        ).to(device),
        starts_S=np.cumsum(lengths_S) - lengths_S,
        lengths_S=lengths_S,
        group_S=np.repeat(np.arange(len(groups)), [len(length) for length in lengths]),
        rewards_S=torch.from_numpy(_concatenate([group.rewards for group in groups], np.float32)),
        staleness_T=_concatenate(
            [_staleness(group, window.step, max_staleness) for group in groups], np.int64
        ),
    )


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _prompt(group: TrainGroup) -> np.ndarray:
    if len(group.samples.prompt_ids) == 0:
        raise ValueError(
            f"group {group.group_id!r} has an empty prompt; its first response token has no "
            "predictor"
        )
    return group.samples.prompt_ids.astype(np.int64)


def _staleness(group: TrainGroup, step: int, bound: int) -> np.ndarray:
    """Policy versions between each token's sampling and this step [T of the group]; 0 where no
    policy sampled it."""
    versions = group.samples.versions_T
    sampled = versions[versions != FROZEN]
    if len(sampled) and step - sampled.min() > bound:
        raise StalenessError(
            f"step {step}: group {group.group_id!r} holds tokens of policy version "
            f"{sampled.min()}, which is "
            f"{step - sampled.min()} versions old where max_staleness allows {bound}; the pacing "
            "of windows is broken"
        )
    if len(sampled) and sampled.max() > step:
        raise StalenessError(
            f"step {step}: group {group.group_id!r} holds tokens of the later version "
            f"{sampled.max()}"
        )
    return np.where(versions == FROZEN, 0, step - versions)


def mini_batches(group_count: int, updates: int, *, seed: int, step: int) -> list[np.ndarray]:
    """Split the groups at random into `updates` mini-batches whose sizes differ by at most one
    (Algorithm 1, step 6).

    Fewer groups than updates give one group each. The permutation depends on seed and step alone.
    """
    if group_count == 0:
        return []
    order = np.random.default_rng([seed, step]).permutation(group_count)
    return np.array_split(order, min(updates, group_count))
