"""Group advantages: the paper's equations, every backend, and statistics that merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, NUMERIC

from zppo_kernels import AdvantageStatistics, advantage_statistics, group_advantages
from zppo_kernels.advantages import AdvantageMode, group_advantages_reference
from zppo_kernels.backends import using_backend

MODES: list[AdvantageMode] = ["norm_without_zero", "norm_with_zero", "center_only", "grpo"]
GROUPS = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=9), min_size=1, max_size=8
)
BINARY = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=8), min_size=1, max_size=12
)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_small_differences_of_large_rewards_survive(
    backend: str, dtype: torch.dtype, mode: AdvantageMode
) -> None:
    """Rewards near 100 with 1e-3 of noise: float32 sums were off by 0.79 of an advantage of 1."""
    noise = np.random.default_rng(0).standard_normal((64, 8))
    rewards_R = torch.from_numpy(100.0 + 1e-3 * noise).flatten().to(dtype)
    groups = rewards_R.double().numpy().reshape(64, 8)
    exact = groups - groups.mean(1, keepdims=True)
    if mode == "grpo":
        exact = exact / (groups.std(1, keepdims=True) + 1e-6)
    elif mode != "center_only":
        exact = exact / (exact.std() + 1e-6)
    with using_backend(backend):
        found_R = group_advantages(rewards_R, torch.arange(512) // 8, mode=mode)
        statistics = advantage_statistics(rewards_R, torch.arange(512) // 8)
    assert np.abs(found_R.numpy() - exact.flatten()).max() < 2e-6 * np.abs(exact).max()
    assert statistics.std == pytest.approx((groups - groups.mean(1, keepdims=True)).std(), rel=1e-9)


def test_errors_say_what_and_where() -> None:
    ids_R = torch.tensor([0, 1])
    for call, sentence in (
        (lambda: group_advantages(torch.tensor([1.0, float("nan")]), ids_R),
         "reward 1 of group 1 is nan; expected a finite number"),
        (lambda: group_advantages(torch.ones(2), torch.tensor([0, 2])),
         "group ids run from 0 to 2; expected 0 to 1, below the number of rollouts"),
        (lambda: group_advantages(torch.ones(2), ids_R, mode="whiten"),
         "mode is 'whiten'; expected one of norm_without_zero, norm_with_zero, center_only, grpo"),
        (lambda: group_advantages(torch.ones(3), ids_R),
         "rewards have shape (3,) and group ids (2,); expected [R] both"),
        (lambda: group_advantages(ids_R, ids_R),
         "rewards are torch.int64 and group ids torch.int64; expected float and integer"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
