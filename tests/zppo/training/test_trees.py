"""Long rows that hold several rollouts: attention branch by branch against torch's with a mask, a
whole model against transformers' eager on each sequence alone, and which rows are long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from training_cases import CPU, SMALL, group, llama, longhand_log_probs, qwen3, trainer_of, window
from transformers import MistralConfig, MistralForCausalLM

from zppo.training import attention, trees
from zppo.training.batch import assemble
from zppo.training.layout import (
    SHARED_WIDTH,
    MicroBatch,
    attention_mask,
    deal_passes,
    with_row,
)
from zppo.training.pictures import SeenPrompt
from zppo.training.policy import Policy
from zppo.training.trainer import Trainer
from zppo.training.trees import branches, in_two_calls, side_by_side
from zppo_protocol.messages import TrainWindow

LONG = window(
    group("long", [1.0, 0.0, 1.0, 0.0], lengths=[530, 520, 510, 500], alphabet=2),
    group("other", [1.0, 0.0], lengths=[600, 520]),
    group("short", [1.0, 0.0], lengths=[9, 8]),
)
"""A tree, a star, and a row with a mask."""


def ends_of(lengths: list[list[int]], alphabet: int) -> Tensor:
    """Ends of the branches of one padded block, a row for each group."""
    groups = [
        group(f"g{i}", [0.0] * len(part), lengths=part, alphabet=alphabet)
        for i, part in enumerate(lengths)
    ]
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    batches = deal_passes(rollouts, np.arange(rollouts.sequences), 900, share=True).batches
    widest = max(batches, key=lambda batch: batch.input_ids_BL.numel())
    if widest.ends_BL is None:
        rows, width = widest.input_ids_BL.shape
        return torch.full((rows, width), width)
    return widest.ends_BL


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    alphabet=st.integers(1, 3),
    key_heads=st.sampled_from([1, 2, 4]),
    attend=st.sampled_from([in_two_calls, side_by_side]),
)
def test_values_and_gradients_of_any_tree_are_those_with_a_mask(
    lengths: list[list[int]], alphabet: int, key_heads: int, attend: Any
) -> None:
    ends_BL = ends_of(lengths, alphabet)
    rows, width = ends_BL.shape
    generator = torch.Generator().manual_seed(width)
    own, theirs = (
        [
            torch.randn(
                (rows, heads, width, 8),
                generator=generator.manual_seed(heads + place),
                dtype=torch.float64,
                requires_grad=True,
            )
            for place, heads in enumerate((4, key_heads, key_heads))
        ]
        for _ in range(2)
    )
    found = attend(*own, branches(ends_BL), 0.3)
    mask = attention_mask(ends_BL, torch.float64)
    expected = scaled_dot_product_attention(*theirs, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def batches_of(policy: Policy, task: TrainWindow) -> tuple[Any, list[MicroBatch]]:
    rollouts = assemble(task, max_staleness=0, device=CPU)
    batches = deal_passes(
        rollouts,
        np.arange(rollouts.sequences),
        5000,
        share=policy.shares_prompts,
        long=policy.shares_long_rows,
    ).batches
    return rollouts, batches


def step_by_rows(policy: Policy, task: TrainWindow) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [T], and the gradients of their sum of squares."""
    rollouts, batches = batches_of(policy, task)
    found_T = torch.zeros(rollouts.tokens)
    for batch in batches:
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        logits_RV = policy.model.get_output_embeddings()(policy.hidden(batch)).float()
        found_R = logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
        found_R.square().sum().backward()
        found_T[batch.tokens_R] = found_R.detach()
    return found_T, {name: p.grad for name, p in policy.parameters().items() if p.grad is not None}


def step_alone(model: Any, task: TrainWindow) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float64, a sequence at a time, by transformers' eager."""
    model = model.double()
    model.set_attn_implementation("eager")
    parts = []
    for one in task.groups:
        for index in range(len(one.rewards)):
            part = longhand_log_probs(model, one.samples, index)
            part.square().sum().backward()
            parts.append(part.detach())
    return torch.cat(parts), {name: p.grad for name, p in model.named_parameters()}


def roomy(model: Any) -> Any:
    """Room for long sequences."""
    model.config.max_position_embeddings = 4096
    return model


def test_side_by_side_has_the_gradients_of_its_values() -> None:
    parts = branches(torch.tensor([[6, 6, 3, 6, 5, 6]]))
    states = [torch.randn(1, heads, 6, 2, dtype=torch.float64) for heads in (2, 1, 1)]
    inputs = [one.requires_grad_() for one in states]
    assert torch.autograd.gradcheck(lambda *own: side_by_side(*own, parts, 0.5), inputs)


def test_side_by_side_keeps_no_keys_of_a_prompt_for_each_of_its_branches() -> None:
    parts = branches(torch.tensor([[8, 8, 8, 8, 5, 6, 7, 8]]))
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side_by_side(query, key, value, parts, 0.5)
    assert len(parts) == 4 and sum(kept.values()) <= 3 * query.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("make", "recompute", "attend"),
    [
        (llama, False, in_two_calls),
        (qwen3, True, in_two_calls),
        (llama, False, side_by_side),
        (qwen3, True, side_by_side),
    ],
)
def test_a_long_row_gives_what_its_sequences_give_alone(
    make: Any, recompute: bool, attend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "in_two_calls", attend)
    policy = Policy(roomy(make()))
    if recompute:
        policy.recompute_layers()
    _, batches = batches_of(policy, LONG)
    widths = [batch.input_ids_BL.shape[1] for batch in batches if batch.ends_BL is not None]
    assert [width > SHARED_WIDTH for width in widths] == [True, True, False]
    found_T, gradients = step_by_rows(policy, LONG)
    expected_T, truth = step_alone(roomy(make()), LONG)
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        error = (gradient.double() - truth[name]).norm() / truth[name].norm()
        assert float(error) <= 1e-5, name


def test_only_groups_of_which_no_two_fit_a_masked_row_make_long_rows() -> None:
    task = window(
        group("wide", [1.0] * 4, lengths=[600] * 4), group("narrow", [1.0] * 4, lengths=[400] * 4)
    )
    rollouts = assemble(task, max_staleness=0, device=CPU)

    def widths(max_tokens: int, *, share: bool = True, long: bool = True) -> list[int]:
        batches = deal_passes(rollouts, np.arange(8), max_tokens, share=share, long=long).batches
        return sorted(
            row // 100 * 100
            for batch in batches
            for row in [batch.input_ids_BL.shape[1]] * len(batch.input_ids_BL)
        )

    assert widths(5000) == [800, 800, 2400]
    assert widths(2000) == [600, 800, 800, 1800]
    assert widths(5000, long=False) == [600, 600, 600, 600, 800, 800]
    assert widths(5000, share=False) == [400, 400, 400, 400, 600, 600, 600, 600]


def mistral(sliding_window: int | None) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=sliding_window)
    )


@pytest.mark.parametrize(("sliding_window", "shares"), [(SHARED_WIDTH, False), (None, True)])
def test_rows_in_which_a_window_may_end_are_not_shared(
    sliding_window: int | None, shares: bool
) -> None:
    policy = Policy(mistral(sliding_window))
    assert policy.shares_prompts and policy.shares_long_rows is shares


def test_a_model_with_another_attention_shares_short_rows_only() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    policy = Policy(model)
    assert policy.shares_prompts and not policy.shares_long_rows


@pytest.mark.parametrize("reader", ["teacher", "reference"])
def test_rows_are_only_as_long_as_every_model_that_reads_them_takes(reader: str) -> None:
    trainer = trainer_of(roomy(llama()))
    rollouts = assemble(LONG, max_staleness=0, device=CPU)

    def trees_of(trainer: Trainer) -> list[bool]:
        batches = trainer.micro_batches(rollouts, np.arange(rollouts.sequences))
        return [
            one.input_ids_BL.shape[1] > SHARED_WIDTH for one in batches if one.ends_BL is not None
        ]

    other = Policy(roomy(llama()))
    assert any(trees_of(replace(trainer, **{reader: other})))
    other.shares_long_rows = False
    assert not any(trees_of(replace(trainer, **{reader: other})))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_long_row_beside_trees_changes_none_of_them(implementation: str) -> None:
    model = roomy(llama())
    model.set_attn_implementation(implementation)
    policy = Policy(model)
    assert policy.shares_long_rows is (implementation == "sdpa")
    (batch,) = batches_of(policy, window(group("a", [1.0, 0.0], lengths=[9, 8])))[1]
    assert batch.ends_BL is not None
    blank = SeenPrompt((), np.zeros((3, 1)), 0, [])
    wider = replace(with_row(batch, [3] * (SHARED_WIDTH + 1), blank), seen_B=())
    torch.testing.assert_close(policy.hidden(wider), policy.hidden(batch))


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 1


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"dropout": 0.1}])
def test_what_a_tree_s_attention_lacks_is_refused(more: dict[str, Any]) -> None:
    states = torch.randn(3, 1, 2, 4, 8)
    ends = torch.full((1, 1, 1, 4), 4)
    with pytest.raises(NotImplementedError, match="a tree's attention has no caps"):
        attention.products_attention(Layer(), *states, attention_mask=ends, **more)


def test_other_devices_than_a_cpu_ask_for_keys_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    for name in ("in_two_calls", "side_by_side"):
        monkeypatch.setattr(trees, name, lambda query, *_, name=name: asked.append(name) or query)
    ends = torch.full((1, 1, 1, 4), 4)
    for device in ("cpu", "meta"):
        states = torch.zeros(3, 1, 2, 4, 8, device=device)
        attention.products_attention(Layer(), *states, attention_mask=ends)
    assert asked == ["in_two_calls", "side_by_side"]


def test_the_branches_are_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, found = Policy(roomy(llama())), trees.branches
    policy.recompute_layers()
    asked: list[Tensor] = []
    monkeypatch.setattr(trees, "branches", lambda ends: asked.append(ends) or found(ends))
    _, batches = batches_of(policy, LONG)
    policy.hidden(batches[0]).sum().backward()
    assert batches[0].input_ids_BL.shape[1] > SHARED_WIDTH and len(asked) == 1
