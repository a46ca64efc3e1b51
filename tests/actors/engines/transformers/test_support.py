"""The supports that the transformers engine reports: against plain forward passes, and through the
trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_model, make_task, save, words
from hypothesis import given, settings
from hypothesis import strategies as st
from support_helpers import assert_supports, kept_ids, task_with_support, trainer_log_probs
from transformers_helpers import build, run, sample

from zppo.config.topology import StudentSampling
from zppo_actors.engines.transformers.sampling import Sampler, most_probable
from zppo_actors.engines.uniforms import LARGEST_UNIFORM
from zppo_protocol.values import Sampling

CUTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 5, "temperature": 0.8},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2, "temperature": 1.5},
    "all, at the limit": {"top_p": 0.99, "top_k": 30, "min_p": 0.01, "support_limit": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(), tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_supports_and_log_probs_are_those_of_the_truncated_distribution(
    folder: Path, cut: dict[str, Any]
) -> None:
    """Four slots for nine sequences, so that rows come and go while they are sampled; other rows
    are not truncated, or nobody asks for their supports."""
    sampling = StudentSampling(max_new_tokens=20, **cut)
    tasks = [
        task_with_support(words(4), sampling, n=3, seed=1),
        make_task(words(7), n=2, seed=2, max_new_tokens=9, top_p=0.6),
        task_with_support(words(9), sampling, n=3, seed=3),
        make_task(words(3), n=1, seed=4, max_new_tokens=30),
    ]
    engine = build(folder, max_sequences=4)
    first, plain, second, whole = run(engine, sample(engine, *tasks))
    assert plain.support is None and whole.support is None
    model = make_model()
    for samples in (first, second):
        assert_supports(model, samples, sampling.in_training, close=1e-4)
        proximal_T = trainer_log_probs(model, samples, sampling.temperature)
        assert np.abs(proximal_T.numpy() - samples.log_probs).max() < 2e-5
        assert samples.support.lengths_T.max() > 1


SETTINGS = st.builds(
    StudentSampling,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 4, 100]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    support_limit=st.sampled_from([1, 6, 128]),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(SETTINGS, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    grain=st.sampled_from([0.0, 0.5]),
)
def test_every_row_has_its_own_support_and_the_lower_of_equal_ids_comes_first(
    rows: list[StudentSampling], seed: int, grain: float
) -> None:
    """`grain` rounds the logits, so that many are equal, as in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(len(rows), 20, generator=generator)
    logits = (logits / grain).round() * grain if grain else logits
    uniforms = torch.rand(len(rows), generator=generator).clamp(max=LARGEST_UNIFORM)
    asked = [row.in_training for row in rows]
    limits = [row.top_k for row in asked]
    sampler = Sampler(asked, torch.device("cpu"), support_limits=limits)
    tokens, log_probs = sampler(logits, uniforms)
    supports = {
        row: [i for i in ids if i >= 0]
        for some, ids_KW in sampler.supports
        for row, ids in zip(some, ids_KW.tolist(), strict=True)
    }
    assert sorted(supports) == [i for i, row in enumerate(rows) if row.truncates]
    for row, found in supports.items():
        kept = kept_ids(logits[row].numpy(), asked[row])
        # Where a share is top_p itself, rounding decides whether the next token is in.
        assert found == kept.tolist() or abs(len(found) - len(kept)) <= 1
        assert len(found) <= asked[row].top_k and int(tokens[row]) in found
        scaled = logits[row, found].double() / asked[row].temperature
        exact = float((scaled - scaled.logsumexp(0))[found.index(int(tokens[row]))])
        assert abs(float(log_probs[row]) - exact) < 1e-5
        alone = Sampler([asked[row]], torch.device("cpu"), support_limits=[asked[row].top_k])
        again = alone(logits[row : row + 1], uniforms[row : row + 1])
        assert again[0] == tokens[row] and again[1] == log_probs[row]


def test_a_share_of_one_leaves_out_no_token_however_small() -> None:
    """The sum of the others is 1 in float32."""
    logits = torch.tensor([[0.0, 0.0, -20.0, -21.0, -22.0]])
    sampler = Sampler([Sampling(1, top_k=4)], torch.device("cpu"), support_limits=[4])
    sampler(logits, torch.tensor([0.5]))
    assert [ids_KW.tolist() for _, ids_KW in sampler.supports] == [[[0, 1, 2, 3]]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -1.5, -2.0, -torch.inf]), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    width=st.integers(1, 12),
)
def test_the_most_probable_are_the_first_of_a_stable_sort(
    rows: list[list[float]], width: int
) -> None:
    values, order = torch.tensor(rows).sort(dim=-1, descending=True, stable=True)
    found = most_probable(torch.tensor(rows), width)
    assert torch.equal(found[0], values[:, :width]) and torch.equal(found[1], order[:, :width])


def test_a_row_that_is_not_finite_gives_a_log_prob_that_is_not_and_harms_no_other() -> None:
    logits = torch.tensor([[torch.nan] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]])
    sampler = Sampler([Sampling(1, top_k=2)] * 2, torch.device("cpu"), support_limits=[2, 2])
    tokens, log_probs = sampler(logits, torch.tensor([0.5, 0.5]))
    assert log_probs.isfinite().tolist() == [False, True] and int(tokens[1]) in (3, 4)
