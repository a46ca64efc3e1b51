"""The sample of rollouts that is read for the metrics alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import CPU, group, llama, mixed_window, trainer_of, window

from zppo.training.batch import Rollouts, assemble
from zppo.training.measuring import SHARE, comb_weights, measuring_weights
from zppo.training.metrics import proximal_metrics
from zppo.training.surrogate import log_prob_pass
from zppo_protocol.values import FROZEN

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, teeth=st.integers(1, 12), start=st.floats(0, 1, exclude_max=True))
def test_the_weights_stand_for_all_tokens(lengths: list[int], teeth: int, start: float) -> None:
    lengths_S = np.array(lengths)
    weights_S = comb_weights(lengths_S, teeth, start)
    assert (weights_S * lengths_S).sum() == pytest.approx(lengths_S.sum())
    assert 1 <= np.count_nonzero(weights_S) <= teeth


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, teeth=st.integers(1, 12))
def test_every_token_is_expected_to_count_once(lengths: list[int], teeth: int) -> None:
    """The mean over evenly spread starts; a rollout's number of teeth changes at two starts."""
    starts, lengths_S = 400, np.array(lengths)
    combs = [comb_weights(lengths_S, teeth, start / starts) for start in range(starts)]
    error_S = np.abs(np.mean(combs, axis=0) - 1)
    assert (error_S <= 2 / starts * (lengths_S.sum() / teeth) / lengths_S + 1e-9).all()


def taught_window(step: int) -> Rollouts:
    """Many groups, most of them without a gradient; one is a frozen model's."""
    task = mixed_window(count=40)
    taught = group("t", [1, 1, 1], lengths=[5, 1, 3], spans=[(9, FROZEN)])
    rollouts = assemble(window(*task.groups, taught), max_staleness=0, device=CPU)
    return replace(rollouts, step=step)


def trained(rollouts: Rollouts) -> np.ndarray:
    return np.array([len(set(g.rewards)) > 1 for g in rollouts.groups])[rollouts.group_S]


def test_metrics_of_a_sample_are_unbiased() -> None:
    """Their mean over 400 steps, against those of all rollouts under the same weights."""
    trainer, rollouts = trainer_of(llama()), taught_window(0)
    everyone = np.arange(rollouts.sequences)
    found = log_prob_pass(trainer, trainer.policy, rollouts, everyone)
    truth = proximal_metrics(rollouts, np.ones(rollouts.sequences), *found)
    drawn = [
        measuring_weights(replace(rollouts, step=step), trained(rollouts), "sample", seed=0)
        for step in range(400)
    ]
    samples = [proximal_metrics(rollouts, weights_S, *found) for weights_S in drawn]
    for name in ("entropy", "mismatch_kl", "importance_weight_mean"):
        values = np.array([sample[name] for sample in samples])
        assert values.std() > 0
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - truth[name]) <= 4 * error, name
    # A mean that forgets the weights is found out by the same measure.
    forgotten = [
        float(np.mean(found[1].numpy()[np.repeat(weights_S > 0, rollouts.lengths_S)]))
        for weights_S in drawn
    ]
    assert abs(np.mean(forgotten) - truth["entropy"]) > 4 * np.std(forgotten) / 20


def test_the_sample_is_a_sixteenth_of_what_is_not_trained_and_a_frozen_models_is_drawn_apart() -> (
    None
):
    rollouts = taught_window(3)
    trained_S = trained(rollouts)
    weights_S = measuring_weights(rollouts, trained_S, "sample", seed=0)
    assert (weights_S[trained_S] == 1).all()
    taught_S = rollouts.group_S == len(rollouts.groups) - 1
    for kind_S, most in ((taught_S, 1), (~taught_S & ~trained_S, 4)):
        assert np.ceil(SHARE * kind_S.sum()) == most
        assert 1 <= np.count_nonzero(weights_S[kind_S]) <= most
        tokens_S = rollouts.lengths_S[kind_S]
        assert (weights_S[kind_S] * tokens_S).sum() == pytest.approx(tokens_S.sum())


def test_the_sample_depends_on_seed_and_step_alone() -> None:
    """So ranks agree on it, and a resumed run draws it again."""

    def drawn(step: int, seed: int) -> list[float]:
        rollouts = taught_window(step)
        return measuring_weights(rollouts, trained(rollouts), "sample", seed=seed).tolist()

    assert drawn(3, 0) == drawn(3, 0)
    assert drawn(3, 0) != drawn(4, 0) and drawn(3, 0) != drawn(3, 1)


def test_a_window_without_a_gradient_is_sampled_too_and_one_without_tokens_is_not() -> None:
    rollouts = assemble(
        window(group("e", [1.0] * 3, lengths=[0, 4, 0]), group("f", [0.0], lengths=[0])),
        max_staleness=0,
        device=CPU,
    )
    weights_S = measuring_weights(rollouts, np.zeros(4, np.bool_), "sample", seed=0)
    assert weights_S.tolist() == [0, 1, 0, 0]
    empty = assemble(window(), max_staleness=0, device=CPU)
    assert len(measuring_weights(empty, np.zeros(0, np.bool_), "sample", seed=0)) == 0
