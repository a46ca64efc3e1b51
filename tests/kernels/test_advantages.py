"""Group advantages: the paper's equations, every backend, and statistics that merge."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, NUMERIC

from zppo_kernels import (
    AdvantageStatistics,
    advantage_statistics,
    decoupled_advantages,
    group_advantages,
)
from zppo_kernels.advantages import WITHIN_GROUP, AdvantageMode, group_advantages_reference
from zppo_kernels.backends import using_backend

MODES: list[AdvantageMode] = list(get_args(AdvantageMode))
GROUPS = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=9), min_size=1, max_size=8
)
BINARY = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=8), min_size=1, max_size=12
)


UNEVEN = st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=9), min_size=1, max_size=8)
"""Groups of any size, whose rewards are to be spread around a large number."""


def longhand(groups: list[np.ndarray], mode: AdvantageMode, eps: float = 1e-6) -> np.ndarray:
    """Every mode as its paper or library writes it, group by group, in float64."""
    everything = np.concatenate(groups)
    centred = [group - group.mean() for group in groups]
    kept = [c for c, g in zip(centred, groups, strict=True) if g.min() < g.max()]
    scale = {
        "norm_without_zero": np.concatenate([[0.0], *kept])[1:].std() if kept else 0.0,
        "norm_with_zero": np.concatenate(centred).std(),
        "batch": everything.std(ddof=1) if len(everything) > 1 else 0.0,
    }
    found = []
    for group in groups:
        if group.min() == group.max():
            found.append(np.zeros(len(group)))
        elif mode == "rloo":
            found.append(np.array([r - np.delete(group, i).mean() for i, r in enumerate(group)]))
        elif mode in ("grpo", "grpo_bessel"):
            std = group.std(ddof=int(mode == "grpo_bessel"))
            found.append((group - group.mean()) / (std + eps))
        else:
            divisor = 1.0 if mode == "center_only" else scale[mode] + eps
            found.append((group - group.mean()) / divisor)
    return np.concatenate(found)


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = torch.tensor([reward for group in groups for reward in group])
    return rewards, torch.tensor([index for index, group in enumerate(groups) for _ in group])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, **NUMERIC)
@given(groups=GROUPS, seed=st.integers(0, 1000))
def test_backends_equal_the_reference_in_any_order(
    backend: str, mode: AdvantageMode, groups: list[list[float]], seed: int
) -> None:
    rewards_R, ids_R = flat(groups)
    order = torch.randperm(len(rewards_R), generator=torch.Generator().manual_seed(seed))
    rewards_R, ids_R = rewards_R[order], ids_R[order]
    with using_backend(backend):
        found_R = group_advantages(rewards_R, ids_R, mode=mode)
        wider_R = group_advantages(
            rewards_R, ids_R, mode=mode, statistics=AdvantageStatistics(4.0, 0.5, 16.0)
        )
    exact_R = group_advantages_reference(rewards_R.double(), ids_R, mode=mode)
    assert found_R.dtype == torch.float32
    assert torch.allclose(found_R.double(), exact_R, atol=2e-6)
    exact_R = group_advantages_reference(
        rewards_R.double(), ids_R, mode=mode, statistics=AdvantageStatistics(4.0, 0.5, 16.0)
    )
    assert torch.allclose(wider_R.double(), exact_R, atol=2e-6)


@pytest.mark.slow
@settings(max_examples=60, **NUMERIC)
@given(groups=BINARY)
def test_equations_4_to_6(groups: list[list[float]]) -> None:
    """Eq. 4: the mean of A' is 0. Eqs. 5, 6: sigma_all = sqrt(f) sigma_nontrivial, so
    `norm_with_zero` inflates by 1 / sqrt(f).
    """
    rewards_R, ids_R = flat(groups)
    share = sum(0 < sum(group) < 8 for group in groups) / len(groups)
    without = advantage_statistics(rewards_R, ids_R, mode="norm_without_zero")
    everything = advantage_statistics(rewards_R, ids_R, mode="norm_with_zero")
    assert abs(without.mean) < 1e-7 and abs(everything.mean) < 1e-7
    assert everything.std == pytest.approx(math.sqrt(share) * without.std, rel=1e-6, abs=1e-12)
    inflated_R = group_advantages(
        rewards_R, ids_R, mode="norm_with_zero", eps=0.0 if share else 1e-6
    )
    plain_R = group_advantages(
        rewards_R, ids_R, mode="norm_without_zero", eps=0.0 if share else 1e-6
    )
    assert torch.allclose(inflated_R * math.sqrt(share), plain_R, atol=1e-5)
    assert torch.equal(plain_R == 0, inflated_R == 0)


def test_equation_1_divides_by_the_groups_own_standard_deviation() -> None:
    rewards_R = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 3.0])
    advantages_R = group_advantages(rewards_R, torch.tensor([0, 0, 0, 0, 1, 1]), mode="grpo")
    std = math.sqrt(3) / 4
    assert advantages_R.tolist() == pytest.approx(
        [0.75 / std, *[-0.25 / std] * 3, 1.0, -1.0], rel=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [0.1, 10000.3])
def test_constant_groups_are_exactly_zero(
    backend: str, mode: AdvantageMode, constant: float
) -> None:
    """The std of a constant 0.1 is 8e-9 and that of 10000.3 by E[x^2] - E[x]^2 is 8: only max ==
    min tells."""
    rewards_R = torch.tensor([constant] * 7 + [0.0, 1.0])
    ids_R = torch.tensor([4] * 7 + [2, 2])
    with using_backend(backend):
        advantages_R = group_advantages(rewards_R, ids_R, mode=mode)
    assert float(advantages_R[:7].abs().max()) == 0.0
    assert float(advantages_R[7]) < 0.0 < float(advantages_R[8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_empty_input_and_groups_of_one(backend: str, mode: AdvantageMode) -> None:
    with using_backend(backend):
        assert group_advantages(
            torch.zeros(0), torch.zeros(0, dtype=torch.int64), mode=mode
        ).shape == (0,)
        assert group_advantages(
            torch.tensor([3.0, 5.0]), torch.tensor([1, 0]), mode=mode
        ).tolist() == [0.0, 0.0]


@pytest.mark.slow
@settings(max_examples=60, **NUMERIC)
@given(
    groups=GROUPS,
    cut=st.integers(0, 8),
    mode=st.sampled_from(["norm_without_zero", "norm_with_zero"]),
)
def test_statistics_of_ranks_merge_to_those_of_one(
    groups: list[list[float]], cut: int, mode: AdvantageMode
) -> None:
    whole = advantage_statistics(*flat(groups), mode=mode)
    parts = [part for part in (groups[:cut], groups[cut:]) if part]
    merged = AdvantageStatistics()
    for part in parts:
        merged = merged.merge(advantage_statistics(*flat(part), mode=mode))
    assert merged.count == whole.count
    assert merged.mean == pytest.approx(whole.mean, abs=1e-7)
    assert merged.m2 == pytest.approx(whole.m2, rel=1e-6, abs=1e-9)
    rank_R = torch.cat(
        [group_advantages(*flat(part), mode=mode, statistics=merged) for part in parts]
    )
    assert torch.allclose(rank_R, group_advantages(*flat(groups), mode=mode), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, **NUMERIC)
@given(groups=UNEVEN, dtype=st.sampled_from([torch.float32, torch.float64]), near=st.integers(0, 1))
def test_every_mode_is_its_formula_written_longhand(
    backend: str, mode: AdvantageMode, groups: list[list[int]], dtype: torch.dtype, near: int
) -> None:
    """Near 100 with steps of 1e-3: float32 sums were off by 0.79 of an advantage of 1."""
    rewards = [torch.tensor(group).to(dtype) * 1e-3 + 100 * near for group in groups]
    ids_R = torch.tensor([index for index, group in enumerate(groups) for _ in group])
    exact = longhand([group.double().numpy() for group in rewards], mode)
    with using_backend(backend):
        found_R = group_advantages(torch.cat(rewards), ids_R, mode=mode)
    assert np.abs(found_R.numpy() - exact).max() < 2e-6 * max(1.0, np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", WITHIN_GROUP)
@settings(max_examples=8, **NUMERIC)
@given(groups=UNEVEN, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_decoupled_rewards_count_by_their_weight_whatever_their_scale(
    backend: str, mode: AdvantageMode, groups: list[list[int]], scale: float
) -> None:
    """GDPO: each reward normalised in its group, weighted, summed, over the sample std of all."""
    ids_R = torch.tensor([index for index, group in enumerate(groups) for _ in group])
    first_R = torch.tensor([float(reward) for group in groups for reward in group])
    second_R = (first_R * 7 + 3).remainder(5) * scale
    weights = (1.0, 0.25)
    sizes = np.cumsum([len(group) for group in groups])[:-1]
    parts = [np.split(r.double().numpy(), sizes) for r in (first_R, second_R)]
    summed = sum(w * longhand(part, mode) for w, part in zip(weights, parts, strict=True))
    assert abs(np.mean(summed)) < 1e-9 * max(1.0, scale)
    exact = summed / ((summed.std(ddof=1) if len(summed) > 1 else 0.0) + 1e-6)
    with using_backend(backend):
        found_R = decoupled_advantages(
            torch.stack([first_R, second_R], 1), torch.tensor(weights), ids_R, mode=mode
        )
    assert np.abs(found_R.numpy() - exact).max() < 4e-6 * max(1.0, np.abs(exact).max())


def test_a_step_scales_the_rewards_of_all_its_mini_batches_together() -> None:
    groups = [[0.0, 2.0, 4.0], [1.0, 1.0], [5.0, 0.0]]
    rewards_R, ids_R = flat(groups)
    statistics = AdvantageStatistics()
    for group in groups:
        statistics = statistics.merge(advantage_statistics(*flat([group]), mode="batch"))
    found_R = torch.cat(
        [group_advantages(*flat([g]), mode="batch", statistics=statistics) for g in groups]
    )
    exact = longhand([np.array(group) for group in groups], "batch")
    assert np.abs(found_R.numpy() - exact).max() < 1e-6
    assert torch.allclose(found_R, group_advantages(rewards_R, ids_R, mode="batch"))


def test_errors_say_what_and_where() -> None:
    ids_R = torch.tensor([0, 1])
    for call, sentence in (
        (lambda: group_advantages(torch.tensor([1.0, float("nan")]), ids_R),
         "reward 1 of group 1 is nan; expected a finite number"),
        (lambda: group_advantages(torch.ones(2), torch.tensor([0, 2])),
         "group ids run from 0 to 2; expected 0 to 1, below the number of rollouts"),
        (lambda: group_advantages(torch.ones(2), ids_R, mode="whiten"),
         "mode is 'whiten'; expected one of norm_without_zero, norm_with_zero, center_only, grpo, "
         "grpo_bessel, rloo, batch"),
        (lambda: decoupled_advantages(torch.ones(2, 1), torch.ones(1), ids_R, mode="batch"),
         "mode is 'batch'; expected one of center_only, grpo, grpo_bessel, rloo"),
        (lambda: decoupled_advantages(torch.ones(2, 3), torch.ones(2), ids_R),
         "rewards have shape (2, 3) and weights (2,); expected [R, K] and [K]"),
        (lambda: decoupled_advantages(torch.ones(2, 1), torch.tensor([float("inf")]), ids_R),
         "weights are [inf]; expected finite numbers"),
        (lambda: group_advantages(torch.ones(3), ids_R),
         "rewards have shape (3,) and group ids (2,); expected [R] both"),
        (lambda: group_advantages(ids_R, ids_R),
         "rewards are torch.int64 and group ids torch.int64; expected float and integer"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
