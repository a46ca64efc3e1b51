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
from zppo_actors.engines.transformers.sampling import Sampler
from zppo_actors.engines.uniforms import LARGEST_UNIFORM

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
    assert [row for _, row in sampler.reported] == [
        i for i, row in enumerate(rows) if row.truncates
    ]
    for place, row in sampler.reported:
        assert sampler.support_KW is not None
        found = [i for i in sampler.support_KW[place].tolist() if i >= 0]
        kept = kept_ids(logits[row].numpy(), asked[row])
        # Where a share is top_p itself, rounding decides whether the next token is in.
        assert found == kept.tolist() or abs(len(found) - len(kept)) <= 1
        assert len(found) <= asked[row].top_k and int(tokens[row]) in found
        scaled = logits[row, found].double() / asked[row].temperature
        exact = float((scaled - scaled.logsumexp(0))[found.index(int(tokens[row]))])
        assert abs(float(log_probs[row]) - exact) < 1e-5
