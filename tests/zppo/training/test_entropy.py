"""The coefficient of the entropy bonus as it moves towards its target."""

from __future__ import annotations

import pytest
from training_cases import llama, method, mixed_window, settings_of, trainer_of

from zppo.training.entropy import EntropyState, applied_coefficient, initial_entropy, moved
from zppo.training.step import train_step

WORDS = method(
    updates_per_step=1,
    entropy_coefficient=0.05,
    entropy_target=2.0,
    entropy_step=0.02,
    entropy_coefficient_max=0.08,
)


def test_the_coefficient_rises_below_the_target_and_falls_above_it_within_its_bounds() -> None:
    state, found = initial_entropy(WORDS), []
    assert state is not None and applied_coefficient(WORDS, state) == 0.0, "nothing is measured yet"
    for entropy in (2.0, 1.0, 1.0, 2.1, 3.0, 3.0, 3.0, 3.0, 0.5):
        state = moved(WORDS, state, entropy)
        found.append((round(state.coefficient, 9), round(applied_coefficient(WORDS, state), 9)))
    assert found == [
        (0.07, 0.07),
        (0.08, 0.08),
        (0.08, 0.08),
        (0.06, 0.0),
        (0.04, 0.0),
        (0.02, 0.0),
        (0.0, 0.0),
        (0.0, 0.0),
        (0.02, 0.02),
    ]


def test_a_fixed_coefficient_has_no_state() -> None:
    words = method(entropy_coefficient=0.3)
    assert initial_entropy(words) is None and applied_coefficient(words, None) == 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("entropy", "applied"), [(1.9, 0.07), (2.1, 0.0)])
def test_an_update_applies_the_state_before_it_and_measures_all_its_tokens(
    entropy: float, applied: float
) -> None:
    """Rollouts without an advantage count in the entropy that is measured, bonus or not."""
    task, model = mixed_window(), llama()
    trainer = trainer_of(model, **settings_of(WORDS))
    trainer.entropy = EntropyState(coefficient=0.07, entropy=entropy)
    bare, bonus = (method(updates_per_step=1, entropy_coefficient=c) for c in (0.0, applied))
    metrics = train_step(trainer, task)
    plain = train_step(trainer_of(llama(), **settings_of(bare), measured_rollouts="all"), task)
    other = train_step(trainer_of(llama(), **settings_of(bonus)), task)
    assert metrics["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert (metrics["loss"] == pytest.approx(plain["loss"], rel=1e-6)) == (applied == 0.0)
    low = plain["entropy"] <= 2.0
    assert trainer.entropy == EntropyState(
        coefficient=pytest.approx(0.08 if low else 0.05),  # type: ignore[arg-type]
        entropy=pytest.approx(plain["entropy"], rel=1e-5),  # type: ignore[arg-type]
    )
    assert metrics["entropy_coefficient"] == trainer.entropy.coefficient
