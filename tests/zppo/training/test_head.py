"""Heads with a scale or a soft cap: found by the probe, trained without logits of all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import (
    CPU,
    SMALL,
    gemma2_with_soft_cap,
    group,
    llama,
    mixed_window,
    phi_with_head_bias,
    trainer_of,
    window,
)
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from zppo.training.batch import assemble
from zppo.training.head import probe_head
from zppo.training.layout import MicroBatch, deal_passes
from zppo.training.step import train_step


def cohere() -> Any:
    torch.manual_seed(0)
    config = CohereConfig(
        **SMALL, num_key_value_heads=1, logit_scale=0.25, bos_token_id=0, eos_token_id=1
    )
    return CohereForCausalLM(config)


def granite() -> Any:
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, num_key_value_heads=1, logits_scaling=8.0))


HEADS: dict[str, tuple[Callable[[], Any], float | None, float]] = {
    "llama": (llama, None, 1.0),
    "phi, bias": (phi_with_head_bias, None, 1.0),
    "gemma2": (gemma2_with_soft_cap, 2.0, 1.0),
    "cohere": (cohere, None, 0.25),
    "granite divides": (granite, None, 0.125),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_scale_and_cap_are_found(name: str, dtype: torch.dtype) -> None:
    make, soft_cap, scale = HEADS[name]
    head = probe_head(make().to(dtype).eval(), "student.model")
    assert head is not None and (head.soft_cap, head.logit_scale) == (soft_cap, scale)


@pytest.mark.parametrize("change", ["cap", "offset", "unnamed scale"])
def test_a_head_that_is_more_keeps_its_own_logits(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap that no setting names is the identity near 0: only larger hidden states show it."""
    model = llama().eval()
    forward = model.lm_head.forward
    changed: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cap": lambda logits: 1000.0 * torch.tanh(logits / 1000.0),
        "offset": lambda logits: logits + torch.arange(logits.shape[-1]),
        "unnamed scale": lambda logits: 1.01 * logits,
    }
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: changed[change](forward(hidden)))
    assert probe_head(model, "student.model") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite divides"])
def test_a_step_is_that_of_the_models_own_logits(name: str) -> None:
    make = HEADS[name][0]
    fused, own = trainer_of(make()), trainer_of(make())
    assert fused.policy.head is not None
    own.policy.head = None
    for step in range(2):
        found, expected = (train_step(one, mixed_window(step)) for one in (fused, own))
        assert found["updates"] == expected["updates"] >= 2
        for key in ("loss", "grad_norm", "entropy", "approximate_kl"):
            assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-6), key


def with_unnamed_scale() -> Any:
    model = llama()
    model.lm_head.register_forward_hook(lambda _, __, logits_BLV: 1.01 * logits_BLV)
    return model


BEGIN_ALIKE = window(
    *(group(f"alike {i}", [1, 0] * 4, lengths=[3] * 8, alphabet=2, seed=i) for i in range(3))
)


def test_rows_whose_logits_are_the_models_own_give_the_update_of_rows_apart() -> None:
    """And no pass has more rows of logits than it has positions, where rows of a `Head` would."""
    together, apart = trainer_of(with_unnamed_scale()), trainer_of(with_unnamed_scale())
    assert together.policy.head is None
    assert together.policy.shares_prompts and not together.policy.shares_states
    apart.policy.shares_prompts = False
    passes: list[MicroBatch] = []
    logits = together.policy.logits

    def watch(batch: MicroBatch) -> torch.Tensor:
        passes.append(batch)
        return logits(batch)

    together.policy.logits = watch  # type: ignore[method-assign]
    found, expected = (train_step(one, BEGIN_ALIKE) for one in (together, apart))
    assert found["updates"] == expected["updates"] >= 2
    assert any(batch.ends_BL is not None for batch in passes)
    assert all(_is_roomy(batch) for batch in passes)
    rollouts = assemble(BEGIN_ALIKE, max_staleness=0, device=CPU)
    crowded = deal_passes(rollouts, np.arange(rollouts.sequences), 10_000, share=True).batches
    assert not all(_is_roomy(batch) for batch in crowded)
    for key in ("loss", "grad_norm", "entropy", "approximate_kl"):
        assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-6), key
    weights = together.policy.parameters()
    for name, weight in apart.policy.parameters().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def _is_roomy(batch: MicroBatch) -> bool:
    return len(batch.tokens_R) <= batch.input_ids_BL.numel()


def test_a_teacher_whose_logits_are_its_own_decides_for_the_student() -> None:
    rollouts = assemble(BEGIN_ALIKE, max_staleness=0, device=CPU)
    everyone = np.arange(rollouts.sequences)
    alone, taught = trainer_of(llama()), trainer_of(llama(), teacher=with_unnamed_scale())
    assert not all(map(_is_roomy, alone.micro_batches(rollouts, everyone)))
    batches = taught.micro_batches(rollouts, everyone)
    assert all(map(_is_roomy, batches)) and any(one.ends_BL is not None for one in batches)
