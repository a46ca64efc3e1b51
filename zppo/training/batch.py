"""The rollouts of one window as flat arrays, cut into mini-batches of whole groups.

Invariants: every token of the window belongs to exactly one sequence, every sequence to exactly one
mini-batch; no token is older than `max_staleness` policy versions. The scheduler keeps that bound
by pacing; it is checked again here. Tokens that a frozen model wrote have no age: they count as
fresh. No rollout holds a token id that the model lacks, or is longer than the model's context: a
teacher with another vocabulary or a longer context can write one, which then loses its tokens and
is counted; its reward stays in its group.

Shape legend: G groups, S sequences (rollouts) of the window, T response tokens of the window, K
parts of a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from zppo.training.pictures import SeenPrompt
from zppo.training.supports import Supports, supports_of
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TokenScores, TrainGroup
from zppo_protocol.values import FROZEN


class StalenessError(RuntimeError):
    """A token is older than the bound allows: a bug in the pacing, which stops the run."""


@dataclass(frozen=True)
class Reach:
    """What a model can read: token ids below `vocabulary`, prompt and response of up to `context`
    tokens together, and none of `unsampled` in a response."""

    vocabulary: int = 2**31
    context: int = 2**31
    unsampled: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """All sequences of a window. `behaviour_T`, `frozen_T` and `token_ids_T` lie on the device, the
    bookkeeping on the host. `frozen_T` marks tokens that no policy sampled; their `behaviour_T`
    says nothing. `unreadable` counts the rollouts that lost their tokens; `masked_S` marks rollouts
    that have no loss and count in no denominator (`method.truncated: mask`). `reward_parts_SK` has
    one more column for the reward of questions with a rule of their own (`_parts`). `supports`:
    where the sampling was truncated. `seen_G`: the pictures of prompts, empty where none
    has any."""

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
    reward_parts_SK: Tensor
    masked_S: np.ndarray
    staleness_T: np.ndarray
    unreadable: int
    supports: Supports | None = None
    seen_G: Sequence[SeenPrompt | None] = ()

    @property
    def sequences(self) -> int:
        return len(self.lengths_S)

    @property
    def sampled_tokens_S(self) -> np.ndarray:
        """How many tokens of each rollout a policy sampled."""
        before = np.concatenate([[0], np.cumsum(~self.frozen_T.cpu().numpy())])
        counts_S: np.ndarray = before[self.starts_S + self.lengths_S] - before[self.starts_S]
        return counts_S

    @property
    def tokens(self) -> int:
        return len(self.host_ids_T)

    @property
    def device(self) -> torch.device:
        return self.token_ids_T.device


def assemble(
    window: TrainWindow,
    *,
    max_staleness: int,
    device: torch.device,
    reach: Reach = Reach(),
    mask_truncated: bool = False,
    look: Callable[[TrainGroup], SeenPrompt | None] | None = None,
) -> Rollouts:
    """Lay the window's groups end to end, as far as a model of this `reach` can read them;
    `mask_truncated` takes what the student was cut off in out of the loss; `look` finds the
    pictures of a group's prompt, and is asked only where there are some.

    Raises StalenessError, ValueError for an empty prompt, and what `look` raises.
    """
    unread = [_unreadable(group, reach) for group in window.groups]
    groups = [
        _without(group, unread_S) if unread_S.any() else group
        for group, unread_S in zip(window.groups, unread, strict=True)
    ]
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
        reward_parts_SK=torch.from_numpy(_parts(groups)),
        masked_S=_concatenate([_truncated(group) & mask_truncated for group in groups], np.bool_),
        staleness_T=_concatenate(
            [_staleness(group, window.step, max_staleness) for group in groups], np.int64
        ),
        unreadable=sum(int(unread_S.sum()) for unread_S in unread),
        supports=supports_of([group.samples for group in groups]),
        seen_G=_seen(groups, look),
    )


def _seen(
    groups: list[TrainGroup], look: Callable[[TrainGroup], SeenPrompt | None] | None
) -> tuple[SeenPrompt | None, ...]:
    if look is None or not any(group.media for group in groups):
        return ()
    return tuple(look(group) if group.media else None for group in groups)


def _unreadable(group: TrainGroup, reach: Reach) -> np.ndarray:
    """Which completions of the group [N] a model of this reach cannot read."""
    samples = group.samples
    lengths = np.diff(samples.offsets)
    owner_T = np.repeat(np.arange(len(lengths)), lengths)
    outside_T = samples.token_ids >= reach.vocabulary
    if reach.unsampled:
        outside_T |= np.isin(samples.token_ids, reach.unsampled)
    unknown = np.bincount(owner_T[outside_T], minlength=len(lengths))
    if len(samples.prompt_ids) and samples.prompt_ids.max() >= reach.vocabulary:
        return lengths > 0
    long = len(samples.prompt_ids) + lengths > reach.context
    return ((unknown > 0) | long) & (lengths > 0)


def _without(group: TrainGroup, unread: np.ndarray) -> TrainGroup:
    """The group with no tokens in its completions `unread` [N]."""
    samples, scores = group.samples, group.scores
    lengths = np.diff(samples.offsets)
    kept_T = np.repeat(~unread, lengths)
    versions = samples.versions_T[kept_T]
    if scores is not None:
        scores = TokenScores(token_ids=scores.token_ids[kept_T], log_probs=scores.log_probs[kept_T])
    samples = structs.replace(
        samples,
        token_ids=samples.token_ids[kept_T],
        log_probs=samples.log_probs[kept_T],
        offsets=np.cumsum([0, *np.where(unread, 0, lengths)]).astype(np.int32),
        version_spans=np.stack([np.ones_like(versions), versions], 1).astype(np.int32),
        support=None if samples.support is None else samples.support.picked(kept_T),
    )
    return structs.replace(group, samples=samples, scores=scores)


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _parts(groups: list[TrainGroup]) -> np.ndarray:
    """The parts of all rewards, and behind them the whole reward of groups that have none, because
    a rule of their question's own stands in the place of all parts; 0 for what a group lacks."""
    given = [group.reward_parts for group in groups if group.reward_parts is not None]
    width = given[0].shape[1] if given else 0
    parts_SK = np.zeros((sum(len(group.rewards) for group in groups), width + 1), np.float32)
    start = 0
    for group in groups:
        rows = slice(start, start + len(group.rewards))
        if group.reward_parts is None:
            parts_SK[rows, width] = group.rewards
        else:
            parts_SK[rows, :width] = group.reward_parts
        start = rows.stop
    return parts_SK


def _prompt(group: TrainGroup) -> np.ndarray:
    if len(group.samples.prompt_ids) == 0:
        raise ValueError(
            f"group {group.group_id!r} has an empty prompt; its first response token has no "
            "predictor"
        )
    return group.samples.prompt_ids.astype(np.int64)


def _truncated(group: TrainGroup) -> np.ndarray:
    """Which rollouts of a group the student was cut off in [S of the group]; a frozen model's are
    not its own."""
    cut_off = np.array(
        [reason == "length" for reason in group.samples.finish_reasons], dtype=np.bool_
    )
    tokens_before = np.concatenate([[0], np.cumsum(group.samples.versions_T != FROZEN)])
    sampled = np.diff(tokens_before[group.samples.offsets])
    return cut_off & (sampled > 0)


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
