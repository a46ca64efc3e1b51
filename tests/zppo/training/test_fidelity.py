"""A model is trained with an attention that computes what its authors' own does, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_cases import SMALL, group, llama, longhand_log_probs, trainer_of, window
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    DeepseekV32Config,
    Gemma2Config,
    MistralConfig,
    MptConfig,
)

from zppo.errors import UserError
from zppo.training import attention
from zppo.training.batch import assemble
from zppo.training.policy import Policy


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def mistral(sliding_window: int | None) -> Any:
    return made(
        MistralConfig(
            **SMALL, num_key_value_heads=1, sliding_window=sliding_window, initializer_range=0.5
        )
    )


@pytest.mark.parametrize(
    ("sliding_window", "shares"), [(8, False), (1023, False), (1024, True), (None, True)]
)
def test_prompts_are_shared_only_where_no_window_ends_within_a_row(
    sliding_window: int | None, shares: bool
) -> None:
    assert Policy(mistral(sliding_window)).shares_prompts is shares


def mpt() -> Any:
    """It counts places (ALiBi)."""
    return made(MptConfig(vocab_size=31, d_model=16, n_heads=4, n_layers=2, max_seq_len=64))


def test_a_model_that_takes_no_positions_shares_no_prompts() -> None:
    """Under weights as small as these no probe would show it."""
    assert not Policy(mpt()).shares_prompts


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_counts_places_all_the_same_shares_no_prompts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is wrong by grows with what stands between two rollouts; by two places it is less
    than what rounding in 16 bits may be."""
    model = mpt()
    for parameter in model.parameters():
        parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    forward = model.forward

    def deaf(position_ids: Any = None, **inputs: Any) -> Any:
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", deaf)
    assert not Policy(model.to(dtype)).shares_prompts


@pytest.mark.slow
def test_a_window_shorter_than_a_shared_row_changes_no_log_prob() -> None:
    trainer = trainer_of(mistral(8))
    task = window(group("a", [1, 0, 0], lengths=[14, 9, 17]), group("b", [1, 0], lengths=[3, 20]))
    rollouts = assemble(task, max_staleness=0, device=torch.device("cpu"))
    found = torch.zeros(rollouts.tokens)
    for batch in trainer.micro_batches(rollouts, np.arange(rollouts.sequences)):
        targets = rollouts.token_ids_T[batch.tokens_R]
        found[batch.tokens_R] = trainer.policy.log_probs(batch, targets, temperature=1.0)[0]
    model = mistral(8)
    model.set_attn_implementation("eager")
    expected = [
        longhand_log_probs(model, g.samples, index)
        for g in task.groups
        for index in range(len(g.rewards))
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)


def test_an_attention_that_leaves_something_out_gives_way_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Policy(llama()).model.config._attn_implementation == attention.NAME
    products = attention.products_attention

    def without_scale(*tensors: Any, **more: Any) -> Any:
        return products(*tensors, **(more | {"scaling": 0.0}))

    monkeypatch.setattr(attention, "products_attention", without_scale)
    assert Policy(llama()).model.config._attn_implementation == "eager"


def test_a_cap_of_the_scores_means_the_reference() -> None:
    """At its usual 50 it changes less than a probe can tell from rounding in 16 bits."""
    config = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8)
    assert config.attn_logit_softcapping == 50.0
    assert Policy(made(config)).model.config._attn_implementation == "eager"
    config = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, attn_logit_softcapping=None)
    assert Policy(made(config)).model.config._attn_implementation == attention.NAME


@torch.no_grad()
def test_a_model_that_looks_up_which_keys_to_see_keeps_to_them() -> None:
    widths = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    index = {"index_topk": 48, "index_head_dim": 8, "index_n_heads": 4}
    heads = {"num_key_value_heads": 2, "v_head_dim": 8, "initializer_range": 0.5}
    policy = Policy(made(DeepseekV32Config(**SMALL, **widths, **experts, **index, **heads)))
    ids = torch.arange(120)[None] * 7 % SMALL["vocab_size"]  # the probes are shorter than 48
    found = policy.model(ids, use_cache=False).logits
    policy.model.set_attn_implementation("eager")
    torch.testing.assert_close(found, policy.model(ids, use_cache=False).logits)


def test_a_model_whose_tokens_see_those_behind_them_is_refused() -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SMALL, initializer_range=0.5))
    with pytest.raises(UserError) as caught:
        Policy(model)
    assert str(caught.value).startswith(
        "student.model: the trainer cannot use '' (bert): the log-prob of a token differs by "
    )
    assert str(caught.value).endswith(
        " between a sequence alone and the same sequence in a batch (less than 0.01 is rounding)"
    )


def test_a_model_that_fails_on_the_probe_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    forward = model.forward

    def short_alone(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 8:
            raise IndexError("index out of range in self\nand more")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", short_alone)
    with pytest.raises(UserError) as caught:
        Policy(model, "teacher.model")
    assert str(caught.value) == (
        "teacher.model: the trainer cannot use '' (llama) (IndexError: index out of range in self)"
    )


def test_layers_that_cannot_be_computed_again_are_refused_in_a_sentence() -> None:
    config = CTRLConfig(vocab_size=31, n_positions=64, n_embd=16, dff=24, n_layer=1, n_head=2)
    with pytest.raises(UserError) as caught:
        Policy(made(config)).recompute_layers()
    assert str(caught.value) == (
        "actors.trainer.gradient_checkpointing is true; expected false, because the layers of '' "
        "(ctrl) cannot be computed again"
    )
