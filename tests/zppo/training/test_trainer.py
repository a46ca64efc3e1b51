"""The training step against plain torch written out longhand, and the properties that the method
rests on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_cases import (
    CPU,
    MODELS,
    OPTIMIZER,
    SETTINGS,
    SMALL,
    gemma2_with_soft_cap,
    group,
    llama,
    longhand_log_probs,
    longhand_loss,
    method,
    mixed_window,
    phi_with_head_bias,
    qwen3,
    settings_of,
    trainer_of,
    window,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from zppo.config.method import MethodConfig
from zppo.config.topology import DataConfig, OptimizerConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo.records import checkpoint
from zppo.training.batch import Rollouts, StalenessError, assemble, mini_batches
from zppo.training.layout import (
    SHARED_WIDTH,
    MicroBatch,
    attention_mask,
    cuts,
    deal_passes,
)
from zppo.training.measuring import Measuring
from zppo.training.metrics import TRAINER_METRICS
from zppo.training.policy import Policy
from zppo.training.state import build_trainer, load_model, save_share
from zppo.training.step import OBJECTIVES, split, train_step
from zppo.training.surrogate import PolicyLoss, log_prob_pass, step_advantages
from zppo.training.trainer import Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.values import Sampling

STUDENT = Path(__file__).parents[3] / "examples" / "quickstart" / "student"


# ---- batches -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(0, 40),
    updates=st.integers(1, 9),
    seed=st.integers(0, 3),
    step=st.integers(0, 3),
)
def test_mini_batches_share_the_groups_out(groups: int, updates: int, seed: int, step: int) -> None:
    batches = mini_batches(groups, updates, seed=seed, step=step)
    assert len(batches) == min(groups, updates)
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(groups))
    sizes = [len(batch) for batch in batches]
    assert not sizes or max(sizes) - min(sizes) <= 1
    again = mini_batches(groups, updates, seed=seed, step=step)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_another_step_is_another_permutation() -> None:
    orders = {
        tuple(np.concatenate(mini_batches(12, 3, seed=0, step=step)).tolist()) for step in range(5)
    }
    assert len(orders) == 5


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    max_tokens=st.integers(1, 60),
    share=st.booleans(),
    crowded=st.booleans(),
    alphabet=st.integers(1, 3),
)
def test_micro_batches_hold_every_token_once(
    lengths: list[list[int]], max_tokens: int, share: bool, crowded: bool, alphabet: int
) -> None:
    groups = [
        group(f"g{i}", [0.0] * len(part), lengths=part, alphabet=alphabet)
        for i, part in enumerate(lengths)
    ]
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    batches = deal_passes(
        rollouts, np.arange(rollouts.sequences), max_tokens, share=share, crowded=crowded
    ).batches
    tokens = [token for batch in batches for token in batch.tokens_R.tolist()]
    assert sorted(tokens) == list(range(rollouts.tokens))
    for batch in batches:
        assert len(batch.input_ids_BL) == 1 or batch.input_ids_BL.numel() <= max_tokens
        assert share or batch.ends_BL is None
        assert (share and crowded) or len(batch.tokens_R) <= batch.input_ids_BL.numel()
        _check_layout(rollouts, batch)
    if share:
        _check_no_repetition(batches)


def _check_layout(rollouts: Rollouts, batch: MicroBatch) -> None:
    """Each position that predicts a token sees its prompt and the rollout's earlier tokens, at
    positions 0, 1, 2, …"""
    width = batch.input_ids_BL.shape[1]
    visible_BLL = _visible(batch)
    for row, token, sequence in zip(
        batch.rows_R.tolist(), batch.tokens_R.tolist(), batch.sequence_ids_R.tolist(), strict=True
    ):
        index = int(batch.sequences_S[sequence])
        prompt, start = rollouts.prompts_G[rollouts.group_S[index]], rollouts.starts_S[index]
        seen = visible_BLL[row // width, row % width]
        assert batch.input_ids_BL[row // width][seen].tolist() == [
            *prompt,
            *rollouts.host_ids_T[start:token],
        ]
        if batch.positions_BL is not None:
            assert batch.positions_BL[row // width][seen].tolist() == list(range(int(seen.sum())))


def _check_no_repetition(batches: list[MicroBatch]) -> None:
    """No two positions of a row have seen the same."""
    for batch in batches:
        visible_BLL = _visible(batch)
        for ids_L, visible_LL in zip(batch.input_ids_BL, visible_BLL, strict=True):
            width = int(visible_LL[:, 0].sum())
            seen = [tuple(ids_L[visible_LL[place]].tolist()) for place in range(width)]
            assert len(set(seen)) == width


def _visible(batch: MicroBatch) -> Tensor:
    """Which positions each position attends to, [B, L, L]."""
    rows, width = batch.input_ids_BL.shape
    if batch.ends_BL is None:
        return torch.ones(width, width, dtype=torch.bool).tril().expand(rows, width, width)
    return attention_mask(batch.ends_BL, torch.float32)[:, 0] == 0


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 30), max_size=9),
    max_tokens=st.integers(1, 90),
    pass_cost=st.integers(0, 40),
)
def test_passes_are_cut_where_they_take_least(
    widths: list[int], max_tokens: int, pass_cost: int
) -> None:
    """Against every way to cut."""
    widths.sort(reverse=True)

    def cost(bounds: list[int]) -> int | None:
        passes = [widths[a:b] for a, b in itertools.pairwise(bounds)]
        sizes = [len(part) * part[0] for part in passes]
        fits = all(
            size <= max_tokens or len(part) == 1 for size, part in zip(sizes, passes, strict=True)
        )
        return sum(sizes) + len(passes) * pass_cost if fits else None

    inner = range(1, len(widths))
    every = [
        cost(sorted({0, *chosen, len(widths)}))
        for count in range(len(widths) or 1)
        for chosen in itertools.combinations(inner, count)
    ]
    bounds = cuts(widths, max_tokens, pass_cost)
    assert bounds[0] == 0 and bounds[-1] == len(widths)
    assert cost(bounds) == min(found for found in every if found is not None)


def test_rollouts_of_a_group_share_one_copy_of_the_prompt() -> None:
    task = window(group("a", [1, 0, 0], lengths=[3, 2, 4]), group("b", [1], lengths=[2]))
    rollouts = assemble(task, max_staleness=0, device=CPU)
    (batch,) = deal_passes(rollouts, np.arange(4), 1000, share=True).batches
    prompt, end = len(rollouts.prompts_G[0]), batch.input_ids_BL.shape[1]
    assert batch.input_ids_BL.shape == (2, prompt + 2 + 1 + 3)
    assert batch.ends_BL is not None
    widths = [len(rollouts.host_ids_T[a : a + b - 1]) for a, b in _sorted_rollouts(rollouts, 0)]
    ends = prompt + np.cumsum(widths)
    assert batch.ends_BL[0].tolist() == [end] * prompt + np.repeat(ends, widths).tolist()


def _sorted_rollouts(rollouts: Rollouts, group: int) -> list[tuple[int, int]]:
    """Start and length of a group's rollouts, as they stand in a row."""
    chosen = np.flatnonzero(rollouts.group_S == group)
    spans = [(int(rollouts.starts_S[one]), int(rollouts.lengths_S[one])) for one in chosen]
    return sorted(spans, key=lambda span: rollouts.host_ids_T[span[0] : sum(span) - 1].tolist())


def test_what_rollouts_begin_with_alike_is_there_once() -> None:
    one = group("a", [1, 0, 0, 1, 0], lengths=[4, 2, 4, 4, 3])
    tokens = [*(3, 4, 5, 9), *(3, 8), *(7, 1, 2, 9), *(3, 4, 5, 9), *(3, 4, 6)]
    samples = msgspec.structs.replace(one.samples, token_ids=np.array(tokens, np.int32))
    rollouts = assemble(
        window(msgspec.structs.replace(one, samples=samples)), max_staleness=0, device=CPU
    )
    (batch,) = deal_passes(rollouts, np.arange(5), 1000, share=True).batches
    prompt = len(rollouts.prompts_G[0])
    # Without their last tokens: 3 | 3 4 | 3 4 5 | 3 4 5 | 7 1 2.
    assert batch.input_ids_BL[0, prompt:].tolist() == [3, 4, 5, 7, 1, 2]
    assert batch.positions_BL is not None and batch.ends_BL is not None
    assert (batch.positions_BL[0, prompt:] - prompt).tolist() == [0, 1, 2, 0, 1, 2]
    assert (batch.ends_BL[0] - prompt).tolist() == [6] * prompt + [3, 3, 3, 6, 6, 6]
    assert batch.sequences_S.tolist() == [1, 4, 0, 3, 2]
    predicted = [[-1, 0], [-1, 0, 1], [-1, 0, 1, 2], [-1, 0, 1, 2], [-1, 3, 4, 5]]
    assert (batch.rows_R - prompt).tolist() == [place for part in predicted for place in part]


def test_rows_are_shared_only_up_to_a_width() -> None:
    rollouts = assemble(
        window(group("a", [1, 0, 0], lengths=[600, 400, 400])), max_staleness=0, device=CPU
    )
    (batch,) = deal_passes(rollouts, np.arange(3), 10_000, share=True).batches
    assert batch.input_ids_BL.shape[0] == 2 and batch.input_ids_BL.shape[1] <= SHARED_WIDTH


def test_token_past_the_staleness_bound_stops_the_step() -> None:
    fresh, stale = (
        group("fresh", [1, 0], lengths=[1, 1]),
        group("stale", [1, 0], lengths=[3, 2], spans=[(4, 5), (1, 3)]),
    )
    assert assemble(window(stale, step=5), max_staleness=2, device=CPU).staleness_T.tolist() == [
        0,
        0,
        0,
        0,
        2,
    ]
    with pytest.raises(StalenessError) as error:
        assemble(window(fresh, stale, step=5), max_staleness=1, device=CPU)
    assert "group 'fresh' holds tokens of policy version 0, which is 5 versions old" in str(
        error.value
    )


def test_a_version_from_the_future_stops_the_step() -> None:
    with pytest.raises(StalenessError, match="group 'g' holds tokens of the later version 7"):
        assemble(
            window(group("g", [1.0], lengths=[2], spans=[(2, 7)]), step=6),
            max_staleness=1,
            device=CPU,
        )


def test_staleness_error_leaves_the_weights_alone() -> None:
    trainer = trainer_of(llama(), max_staleness=0)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters().items()}
    with pytest.raises(StalenessError):
        train_step(trainer, window(group("g", [1.0, 0.0]), step=1))
    assert all(torch.equal(before[name], p) for name, p in trainer.policy.parameters().items())
    assert trainer.optimizer.updates == 0


# ---- log-probs -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batched_log_probs_are_those_of_one_sequence_at_a_time(
    name: str, share: bool, temperature: float
) -> None:
    policy = Policy(MODELS[name]())
    assert policy.head is not None
    task = mixed_window()
    rollouts = assemble(task, max_staleness=0, device=CPU)
    (batch,) = deal_passes(
        rollouts, np.arange(rollouts.sequences), 10_000, share=share and policy.shares_prompts
    ).batches
    found, entropy = policy.log_probs(
        batch, rollouts.token_ids_T[batch.tokens_R], temperature=temperature
    )
    in_order = torch.zeros(rollouts.tokens).index_copy(0, batch.tokens_R, found)
    expected = torch.cat(
        [
            longhand_log_probs(policy.model, g.samples, index, temperature)
            for g in task.groups
            for index in range(len(g.rewards))
        ]
    )
    torch.testing.assert_close(in_order.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert bool((entropy >= 0).all())


def test_prompts_are_shared_where_attention_allows_it() -> None:
    assert Policy(llama()).shares_prompts and Policy(llama(dtype=torch.bfloat16)).shares_prompts
    assert Policy(qwen3()).shares_prompts and Policy(phi_with_head_bias()).shares_prompts
    # Gemma 2 alternates full attention with sliding windows, which a mask over one row cannot
    # express.
    assert not Policy(gemma2_with_soft_cap()).shares_prompts


def test_a_long_rollout_keeps_its_window_beside_others_that_share_a_prompt() -> None:
    torch.manual_seed(0)
    shape = SMALL | dict(num_key_value_heads=1, initializer_range=0.5)
    config = MistralConfig(**shape, sliding_window=SHARED_WIDTH)
    config.max_position_embeddings = 2048
    policy = Policy(MistralForCausalLM(config))
    assert policy.shares_prompts
    task = window(
        group("long", [1.0], lengths=[1200]), group("short", [1.0, 0.0], lengths=[480, 480])
    )
    rollouts = assemble(task, max_staleness=0, device=CPU)
    batches = deal_passes(rollouts, np.arange(3), 10_000, share=True).batches
    assert [batch.ends_BL is None for batch in batches] == [True, False]
    for batch in batches:
        found, _ = policy.log_probs(batch, rollouts.token_ids_T[batch.tokens_R], temperature=1.0)
        in_order = torch.zeros(rollouts.tokens).index_copy(0, batch.tokens_R, found)
        for sequence in batch.sequences_S.tolist():
            g, index = task.groups[rollouts.group_S[sequence]], int(sequence == 2)
            expected = longhand_log_probs(policy.model, g.samples, index, 1.0).detach()
            start, length = rollouts.starts_S[sequence], rollouts.lengths_S[sequence]
            torch.testing.assert_close(
                in_order[start : start + length].double(), expected, rtol=1e-3, atol=1e-3
            )


def test_the_probe_itself_finds_a_model_that_mixes_rollouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    forward = model.model.forward

    def without_mask(**inputs: Any) -> Any:
        return forward(**(inputs | {"attention_mask": None}))

    monkeypatch.setattr(model.model, "forward", without_mask)
    assert not Policy(model).shares_prompts


def test_dropout_is_off_in_both_passes() -> None:
    trainer = trainer_of(llama(attention_dropout=0.9))
    metrics = train_step(trainer, mixed_window())
    once = trainer_of(llama(attention_dropout=0.0))
    assert metrics == train_step(once, mixed_window())


@pytest.mark.slow
def test_recomputed_layers_give_the_same_step() -> None:
    plain, recomputed = (
        trainer_of(llama(attention_dropout=0.5)),
        trainer_of(llama(attention_dropout=0.5)),
    )
    recomputed.policy.recompute_layers()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    recomputed.policy.model.model.layers[0].self_attn.register_forward_hook(count)
    found = train_step(recomputed, mixed_window())
    assert train_step(plain, mixed_window()) == found
    assert same_weights(plain, recomputed)
    # A proximal pass, one that only measures, and two for each mini-batch that has a gradient.
    assert calls == 2 + 2 * found["updates"] > 2


# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_are_normalised_within_each_mini_batch_or_over_the_step() -> None:
    task = window(group("a", [1, 0]), group("b", [1, 0, 0, 0]), group("c", [1, 1]))
    rollouts = assemble(task, max_staleness=0, device=CPU)
    batches = [np.array([0, 1]), np.array([2, 3, 4, 5, 6, 7])]
    within = step_advantages(rollouts, batches, method())
    over = step_advantages(rollouts, batches, method(advantage_scope="step"))
    # a: ±0.5; b: 0.75, -0.25 three times; c is trivial. Eq. 3 divides by the population std.
    std_b, std_all = (0.75 / 4) ** 0.5, ((0.5 + 0.75) / 6) ** 0.5
    expected_b, raw = [0.75, -0.25, -0.25, -0.25], [0.5, -0.5, 0.75, -0.25, -0.25, -0.25]
    torch.testing.assert_close(
        within, torch.tensor([1, -1, *(x / std_b for x in expected_b), 0, 0]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        over, torch.tensor([*(x / std_all for x in raw), 0, 0]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scope", ["minibatch", "step"])
def test_decoupled_rewards_are_normalised_apart_then_weighted_then_scaled_together(
    scope: Literal["minibatch", "step"],
) -> None:
    """GDPO by hand: the second reward is a thousand times smaller and counts by its weight."""
    parts = [np.array([[1, 0.001], [0, 0.003], [1, 0.001]]), np.array([[1, 0.002], [1, 0.0]])]
    groups = [
        msgspec.structs.replace(
            group(name, [0.0] * len(part)), reward_parts=part.astype(np.float32)
        )
        for name, part in zip("ab", parts, strict=True)
    ]
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    words = method(advantage="grpo_bessel", advantage_rewards="decoupled", advantage_scope=scope)
    batches = [np.array([0, 1, 2]), np.array([3, 4])]
    found = step_advantages(rollouts, batches, words, (1.0, 0.5))
    summed = []
    for part in parts:
        std = part.std(0, ddof=1)
        normal = (part - part.mean(0)) / np.where(std > 0, std + 1e-6, 1.0)
        summed.append(normal @ [1.0, 0.5])
    scales = [one.std(ddof=1) for one in summed]
    if scope == "step":
        scales = [np.concatenate(summed).std(ddof=1)] * 2
    expected = np.concatenate([one / (s + 1e-6) for one, s in zip(summed, scales, strict=True)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("others", [0, 1])
def test_a_question_with_a_rule_of_its_own_counts_by_it_among_decoupled_rewards(
    others: int,
) -> None:
    """Its group has no parts: its reward, normalised in its group, is the whole sum."""
    parts = np.array([[1, 0.5], [0, 0.0]], np.float32)
    groups = [msgspec.structs.replace(group("a", [0.0, 0.0]), reward_parts=parts)] * others
    groups.append(group("b", [0.0, 1.0, 1.0]))
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    words = method(advantage="center_only", advantage_rewards="decoupled")
    everyone = [np.arange(rollouts.sequences)]
    found = step_advantages(rollouts, everyone, words, (2.0, 4.0))
    sums = np.array([2.0, -2.0] * others + [-2 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(found.numpy(), sums / (sums.std(ddof=1) + 1e-6), rtol=1e-5)


# ---- the step ------------------------------------------------------------------------------------


def longhand_step(
    model: Any, task: TrainWindow, words: MethodConfig, **more: Any
) -> tuple[float, float]:
    """One update with torch's own AdamW; returns loss and gradient norm."""
    rollouts = assemble(task, max_staleness=0, device=CPU)
    advantages = step_advantages(rollouts, [np.arange(rollouts.sequences)], words)
    reference = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
    )
    loss = longhand_loss(model, task, advantages, words, **more)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    reference.step()
    return float(loss.detach()), float(norm)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize(
    "words",
    [
        method(updates_per_step=1),
        method(updates_per_step=1, correction="mask", dual_clip=None),
        method(updates_per_step=1, correction="none", loss_normalisation="sequence"),
        method(updates_per_step=1, ratio="behaviour", clip_high=0.5),
    ],
    ids=["truncate", "mask", "none, sequence", "behaviour"],
)
def test_one_update_is_the_papers_loss_written_longhand(
    micro_batch_tokens: int, words: MethodConfig
) -> None:
    ours, theirs, task = llama(), llama(), mixed_window()
    changes = settings_of(words) | {"micro_batch_tokens": micro_batch_tokens}
    metrics = train_step(trainer_of(ours, **changes), task)
    loss, norm = longhand_step(theirs, task, words)
    same_update(ours, theirs, metrics, loss, norm)


def same_update(
    ours: Any, theirs: Any, metrics: dict[str, float], loss: float, norm: float
) -> None:
    """One update of ours and of the longhand's."""
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    # The first update of Adam is lr * sign(gradient), so a gradient of rounding size may go either
    # way.
    for name, parameter in ours.named_parameters():
        far = (parameter - theirs.get_parameter(name)).abs() > 1e-4
        assert float(far.float().mean()) < 0.02, name


LOSSES = {
    "cispo": dict(surrogate="cispo", clip_low=0.5, ratio="behaviour"),
    "sapo": dict(surrogate="sapo", sapo_temperature_negative=2.0, ratio="behaviour"),
    "dppo_tv": dict(surrogate="dppo_tv", clip_low=0.1, clip_high=0.05, ratio="behaviour"),
    "dppo_kl": dict(surrogate="dppo_kl", clip_low=0.1, clip_high=0.05, ratio="behaviour"),
    "sequence ratio": dict(
        ratio_level="sequence", ratio="behaviour", loss_normalisation="sequence", clip_high=1.0
    ),
    "sequence correction": dict(correction_level="sequence"),
    "sequence mask": dict(correction="mask", correction_level="sequence", correction_floor=1e-3),
    "floor": dict(correction="mask", correction_floor=0.3),
    "fixed length": dict(loss_normalisation="fixed_length"),
    "luspo": dict(
        loss_normalisation="fixed_length", fixed_length=1, ratio_level="sequence", ratio="behaviour"
    ),
    "micro-batch": dict(loss_normalisation="micro_batch"),
    "entropy": dict(entropy_coefficient=0.3),
    "entropy, sequence": dict(entropy_coefficient=0.3, loss_normalisation="sequence"),
    "entropy quantile": dict(entropy_quantile=0.4),
    "entropy quantile, sequence ratio": dict(
        entropy_quantile=0.4,
        ratio_level="sequence",
        ratio="behaviour",
        loss_normalisation="sequence",
        clip_high=1.0,
    ),
    "kl": dict(kl_coefficient=0.5),
    "kl k1, importance": dict(
        kl_coefficient=0.5, kl_estimator="k1", kl_correction="importance", ratio="behaviour"
    ),
    "kl k2": dict(kl_coefficient=0.5, kl_estimator="k2"),
    "kl straight through": dict(kl_coefficient=0.5, kl_correction="straight_through"),
    "all": dict(
        ratio_level="sequence",
        correction="mask",
        correction_floor=0.1,
        loss_normalisation="sequence",
        entropy_coefficient=0.1,
        entropy_quantile=0.5,
        kl_coefficient=0.1,
        advantage="rloo",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "micro_batch_tokens"),
    [*((words, 1) for words in LOSSES.values()), (LOSSES["micro-batch"], 10_000)],
    ids=[*LOSSES, "micro-batch of all"],
)
def test_every_setting_of_the_loss_is_its_formula_written_longhand(
    words: dict[str, Any], micro_batch_tokens: int
) -> None:
    ours, theirs, task = llama(), llama(), mixed_window()
    chosen = method(updates_per_step=1, **words)
    held: dict[str, Any] = {"reference": llama(seed=1)} if "kl_coefficient" in words else {}
    changes = settings_of(chosen) | {"micro_batch_tokens": micro_batch_tokens}
    metrics = train_step(trainer_of(ours, **changes, **held), task)
    passes = chosen.loss_normalisation == "micro_batch" and micro_batch_tokens == 1
    loss, norm = longhand_step(theirs, task, chosen, passes=passes, **held)
    same_update(ours, theirs, metrics, loss, norm)
    plain, _ = longhand_step(llama(), task, method(updates_per_step=1))
    assert abs(loss - plain) > 1e-4 * abs(plain), "the setting changes the loss"


def test_a_kl_is_measured_and_its_reference_is_never_stepped() -> None:
    held, task = llama(seed=1), mixed_window()
    before = {name: p.detach().clone() for name, p in held.named_parameters()}
    words = method(updates_per_step=1, kl_coefficient=0.5)
    trainer = trainer_of(llama(), reference=held, **settings_of(words))
    metrics = train_step(trainer, task)
    found = []
    for g in task.groups:
        for index in range(len(g.rewards)):
            away = longhand_log_probs(llama(), g.samples, index) - longhand_log_probs(
                held, g.samples, index
            )
            found.append((-away).exp() - 1 + away)
    expected = float(torch.cat(found).mean().detach())
    assert metrics["reference_kl"] == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(before[name], p) for name, p in held.named_parameters())


def cut_off_window() -> TrainWindow:
    """Right and wrong rollouts that were cut off, and a group of nothing else."""
    return window(
        group("a", [1, 0, 0, 1], cut_off={1}),
        group("b", [1, 0, 1], cut_off={0, 2}),
        group("c", [0, 1], cut_off={0, 1}),
        group("d", [1, 0, 0]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_masked_rollouts_have_no_loss_but_count_in_the_baseline(normalisation: str) -> None:
    words = method(updates_per_step=1, truncated="mask", loss_normalisation=normalisation)
    loss = replace(SETTINGS.loss, normalisation=normalisation)
    ours, theirs, task = llama(), llama(), cut_off_window()
    metrics = train_step(trainer_of(ours, method=words, loss=loss), task)
    # `longhand_step` takes the advantages of all rollouts and drops the terms of the masked ones.
    expected, norm = longhand_step(theirs, task, words)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["accuracy_plain"] == pytest.approx(6 / 12), "they are graded like any other"
    assert metrics["live_rollout_share"] == pytest.approx(7 / 12)


def test_with_count_a_cut_off_rollout_is_like_any_other() -> None:
    plain = [
        msgspec.structs.replace(
            g, samples=msgspec.structs.replace(g.samples, finish_reasons=["stop"] * len(g.rewards))
        )
        for g in cut_off_window().groups
    ]
    losses = [
        train_step(trainer_of(llama()), task)["loss"] for task in (cut_off_window(), window(*plain))
    ]
    assert losses[0] == losses[1]


def test_a_window_of_masked_rollouts_alone_makes_no_update() -> None:
    model, task = llama(), window(group("a", [1, 0], cut_off={0, 1}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = train_step(trainer_of(model, method=method(truncated="mask")), task)
    assert metrics["updates"] == 0 and all(
        torch.equal(before[name], p) for name, p in model.named_parameters()
    )


def test_a_teachers_response_is_never_masked() -> None:
    frozen = group("a", [1, 0], lengths=[3, 2], spans=[(3, -1), (2, 0)], cut_off={0, 1})
    rollouts = assemble(window(frozen), max_staleness=0, device=CPU, mask_truncated=True)
    assert rollouts.masked_S.tolist() == [False, True]


def test_rollouts_without_advantage_cost_no_pass_of_an_update_but_count_in_the_denominator() -> (
    None
):
    mixed = group("mixed", [1, 0], lengths=[3, 3])
    wrong = group("wrong", [0, 0, 0], lengths=[2, 4, 6])
    words = method(updates_per_step=1)
    alone, together = trainer_of(llama(), method=words), trainer_of(llama(), method=words)
    passes = {"alone": 0, "together": 0}
    alone.tick = lambda: passes.__setitem__("alone", passes["alone"] + 1)
    together.tick = lambda: passes.__setitem__("together", passes["together"] + 1)
    first, second = train_step(alone, window(mixed)), train_step(together, window(mixed, wrong))
    assert second["grad_norm"] == pytest.approx(first["grad_norm"] * 6 / 18, rel=1e-3)
    # The first update is its own proximal pass; what has no advantage is read once, to be measured.
    assert passes == {"alone": 1, "together": 2}
    assert second["live_rollout_share"] == pytest.approx(2 / 5)


@pytest.fixture
def surrogates(monkeypatch: pytest.MonkeyPatch) -> list[PolicyLoss]:
    """The objectives of the steps that the test makes."""
    made: list[PolicyLoss] = []

    def make(*arguments: Any) -> PolicyLoss:
        made.append(PolicyLoss(*arguments))
        return made[-1]

    monkeypatch.setitem(OBJECTIVES, "clipped_surrogate", make)
    return made


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("measured", ["all", "trained"])
@pytest.mark.parametrize("make", [llama, gemma2_with_soft_cap])
def test_first_update_gives_the_log_probs_of_a_proximal_pass(
    make: Callable[[], Any],
    measured: Literal["all", "trained"],
    updates: int,
    surrogates: list[PolicyLoss],
) -> None:
    """Against a pass of its own over every rollout before anything is updated."""
    task = mixed_window()
    trainer = trainer_of(
        make(), method=method(updates_per_step=updates), measured_rollouts=measured
    )
    rollouts = assemble(task, max_staleness=trainer.settings.max_staleness, device=CPU)
    proximal_T, entropy_T = log_prob_pass(
        trainer, trainer.policy, rollouts, np.arange(rollouts.sequences)
    )
    train_step(trainer, task)
    [objective] = surrogates
    live_S = np.isin(np.arange(rollouts.sequences), objective.live(np.arange(rollouts.sequences)))
    read_T = np.repeat(live_S | (measured == "all"), rollouts.lengths_S)
    assert read_T.any()
    torch.testing.assert_close(
        objective.proximal_T[read_T], proximal_T[read_T], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(objective.entropy_T[read_T], entropy_T[read_T], rtol=1e-5, atol=1e-5)


def test_first_update_need_not_be_the_first_mini_batch(
    surrogates: list[PolicyLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mini-batch without an advantage makes no update, so the one behind it still sees the
    weights of the start."""
    groups = [group("a", [1, 0]), group("b", [0, 0]), group("c", [0, 1, 1])]
    trainer = trainer_of(llama(), method=method(updates_per_step=3), measured_rollouts="trained")
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU)
    wrong_first = sorted(
        split(rollouts, trainer.settings), key=lambda sequences: rollouts.group_S[sequences[0]] != 1
    )
    monkeypatch.setattr("zppo.training.step.split", lambda *_: wrong_first)
    proximal_T, _ = log_prob_pass(trainer, trainer.policy, rollouts, np.arange(rollouts.sequences))
    assert train_step(trainer, window(*groups))["updates"] == 2
    [objective] = surrogates
    read_T = np.repeat(rollouts.group_S != 1, rollouts.lengths_S)
    torch.testing.assert_close(
        objective.proximal_T[read_T], proximal_T[read_T], rtol=1e-5, atol=1e-5
    )


MEASURED = (
    "entropy",
    "mismatch_kl",
    "importance_weight_mean",
    "importance_weight_max",
    "log_prob_gap_max",
)
"""Metrics of the proximal policy."""


@pytest.mark.parametrize("updates", [1, 3])
def test_what_is_measured_changes_no_bit_of_what_is_trained(updates: int) -> None:
    words = method(updates_per_step=updates)
    trainers: dict[Measuring, Trainer] = {
        measured: trainer_of(llama(), method=words, measured_rollouts=measured)
        for measured in ("all", "sample", "trained")
    }
    found = {}
    for measured, trainer in trainers.items():
        train_step(trainer, mixed_window(count=15))
        found[measured] = train_step(trainer, mixed_window(step=1, count=15))
    for measured in ("sample", "trained"):
        for name, parameter in trainers["all"].policy.parameters().items():
            same = torch.equal(trainers[measured].policy.parameters()[name], parameter)
            assert same, (measured, name)
        unlike = {name for name in found["all"] if found[measured][name] != found["all"][name]}
        assert {"entropy", "mismatch_kl"} <= unlike <= {*MEASURED, "seconds_proximal"}


def test_measuring_trained_rollouts_alone_is_measuring_a_window_of_them() -> None:
    mixed = group("mixed", [1, 0], lengths=[3, 3])
    task = window(mixed, group("wrong", [0, 0, 0], lengths=[2, 4, 6], seed=1))
    found = train_step(trainer_of(llama(), measured_rollouts="trained"), task)
    alone = train_step(trainer_of(llama(), measured_rollouts="all"), window(mixed))
    for name in MEASURED:
        assert found[name] == pytest.approx(alone[name], rel=1e-4), name


def test_nothing_is_measured_where_nothing_is_trained() -> None:
    trainer = trainer_of(llama(), measured_rollouts="trained")
    passes: list[None] = []
    trainer.tick = lambda: passes.append(None)
    metrics = train_step(trainer, window(group("right", [1, 1]), group("wrong", [0, 0])))
    assert not passes and metrics["updates"] == 0
    assert not metrics.keys() & {"entropy", "clip_low_share", "dual_clip_share", "approximate_kl"}


def test_a_window_of_trivial_groups_makes_no_update() -> None:
    trainer = trainer_of(llama())
    train_step(trainer, mixed_window())
    before = [p.detach().clone() for p in trainer.policy.parameters().values()]
    metrics = train_step(trainer, window(group("right", [1, 1]), group("wrong", [0, 0])))
    assert (
        metrics["loss"],
        metrics["grad_norm"],
        metrics["updates"],
        metrics["updates_skipped"],
    ) == (0, 0, 0, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters().values(), strict=True)
    )


def test_empty_completions_and_an_empty_window_are_no_trouble() -> None:
    metrics = train_step(
        trainer_of(llama()),
        window(group("g", [1, 0, 0], lengths=[2, 0, 3]), group("e", [1], lengths=[0])),
    )
    assert metrics["tokens_trained"] == 5 and metrics["updates"] == 1
    nothing = train_step(trainer_of(llama()), window())
    of_nothing = {"loss", "grad_norm", "positive_advantage_share", "live_rollout_share"}
    counts = {"tokens_trained", "unreadable_rollouts", "updates", "updates_skipped"}
    assert nothing.keys() == of_nothing | counts | {"seconds_proximal", "seconds_update"}
    assert not any(nothing[name] for name in of_nothing | counts)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), updates=st.integers(1, 5))
def test_each_rollout_is_in_one_update(count: int, updates: int) -> None:
    rollouts = assemble(mixed_window(count=count), max_staleness=0, device=CPU)
    batches = split(rollouts, replace(SETTINGS, method=method(updates_per_step=updates)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(rollouts.sequences))
    owners = [set(rollouts.group_S[batch].tolist()) for batch in batches]
    assert all(not (a & b) for a, b in itertools.combinations(owners, 2))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_whole(broken: str) -> None:
    """The second update is poisoned; the result is the step without it."""
    trainer, clean = trainer_of(llama()), trainer_of(llama())
    task = window(group("a", [1, 0]), group("b", [1, 0]), group("c", [0, 1]))
    # With 1e30 the loss stays finite, but the squares of its gradient do not.
    poison, calls = float("nan") if broken == "loss" else 1e30, 0
    original = trainer.policy.policy_loss_of

    def loss(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        output = original(*arguments, **named)
        return replace(output, loss=output.loss * poison) if calls == 2 else output

    trainer.policy.policy_loss_of = loss  # type: ignore[method-assign]
    states = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda gradients: states.append(1) or step(gradients)  # type: ignore[method-assign,func-returns-value]
    metrics = train_step(trainer, task)
    assert (metrics["updates"], metrics["updates_skipped"], len(states)) == (2, 1, 2)
    assert all(bool(p.isfinite().all()) for p in trainer.policy.parameters().values())
    assert all(bool(moment.isfinite().all()) for _, moment in trainer.optimizer.tensors())
    assert abs(metrics["loss"]) < 10 and metrics["grad_norm"] < 1e6
    train_step(clean, task)
    assert not same_weights(trainer, clean)


def test_a_student_with_damaged_weights_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(
        UserError, match="the model's logits are not finite, so its weights are damaged"
    ):
        Policy(model)


def test_a_model_that_gives_nan_is_never_stepped_and_its_metrics_stay_finite() -> None:
    trainer = trainer_of(llama())
    with torch.no_grad():
        trainer.policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    metrics = train_step(trainer, window(group("a", [1, 0]), group("b", [0, 1])))
    assert (metrics["updates"], metrics["updates_skipped"]) == (0, 2)
    assert trainer.optimizer.updates == 0
    assert all(np.isfinite(value) for value in metrics.values())
    assert "entropy" not in metrics


def test_metrics_have_the_names_of_the_table() -> None:
    metrics = train_step(trainer_of(llama()), mixed_window())
    others = {"accuracy_<kind>", "jsd", "entropy_coefficient", "reference_kl"}
    table = {metric.name for metric in TRAINER_METRICS} - others
    assert metrics.keys() == table | {"accuracy_plain", "accuracy_bcq"}
    assert metrics["accuracy_bcq"] == 0.5 and metrics["accuracy_plain"] == pytest.approx(7 / 15)
    assert metrics["seconds_proximal"] == 1.0 and metrics["seconds_update"] == 1.0
    assert metrics["staleness_max"] == 0.0


def test_mismatch_metrics_see_the_gap_between_engine_and_trainer() -> None:
    model = llama()
    task = window(group("g", [1, 0], lengths=[2, 2]))
    sample = task.groups[0].samples
    exact = (
        torch.cat([longhand_log_probs(model, sample, index) for index in range(2)]).detach().numpy()
    )
    shifted = msgspec.structs.replace(
        sample, log_probs=(exact - [0, 0, 0, np.log(3)]).astype(np.float32)
    )
    metrics = train_step(
        trainer_of(model), window(msgspec.structs.replace(task.groups[0], samples=shifted))
    )
    assert metrics["log_prob_gap_max"] == pytest.approx(np.log(3), abs=1e-4)
    assert metrics["importance_weight_max"] == pytest.approx(3, abs=1e-3)
    assert metrics["importance_weight_mean"] == pytest.approx(1.5, abs=1e-3)
    assert metrics["mismatch_kl"] == pytest.approx((2 - np.log(3)) / 4, abs=1e-3)


def test_the_step_raises_the_chance_of_rewarded_rollouts() -> None:
    task = window(group("g", [1, 0], lengths=[4, 4]))
    trainer = trainer_of(llama(), method=method(updates_per_step=1))
    sample = task.groups[0].samples
    before = [
        float(longhand_log_probs(trainer.policy.model, sample, i).sum().detach()) for i in (0, 1)
    ]
    for _ in range(3):
        train_step(trainer, task)
    after = [
        float(longhand_log_probs(trainer.policy.model, sample, i).sum().detach()) for i in (0, 1)
    ]
    assert after[0] > before[0] and after[1] < before[1]


# ---- state ---------------------------------------------------------------------------------------


def same_weights(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.policy.parameters().values(), other.policy.parameters().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def saved_student(folder: Path, dtype: torch.dtype) -> Path:
    llama(dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)
    return folder


def topology_of(student: Path, dtype: str, words: MethodConfig | None = None) -> Topology:
    return Topology(
        method=words or method(),
        data=DataConfig(train="x"),
        student=StudentConfig(model=str(student), dtype=dtype, sampling=Sampling(max_new_tokens=8)),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(
            learning_rate=1e-2, state_dtype="float32" if dtype == "float32" else "bfloat16"
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float32", method()),
        ("bfloat16", method()),
        (
            "float32",
            method(
                updates_per_step=2,
                kl_coefficient=0.5,
                entropy_coefficient=0.05,
                entropy_target=1.2,
                entropy_step=0.02,
            ),
        ),
    ],
    ids=["float32", "bfloat16", "KL and a moving entropy coefficient"],
)
def test_six_steps_straight_are_three_and_a_restart_and_three_bit_for_bit(
    tmp_path: Path, dtype: str, words: MethodConfig
) -> None:
    student = saved_student(tmp_path / "student", getattr(torch, dtype))
    topology = topology_of(student, dtype, words)
    straight, first = build_trainer(topology, float), build_trainer(topology, float)
    for step in range(6):
        train_step(straight, mixed_window(step))
    for step in range(3):
        train_step(first, mixed_window(step))
    folder = checkpoint.begin(tmp_path, 3)
    save_share(first, folder, step=3)
    folder = checkpoint.commit(tmp_path, 3)
    torch.rand(7)  # the global generator must not matter
    resumed = build_trainer(topology, float, folder)
    assert same_weights(first, resumed)
    for step in range(3, 6):
        train_step(resumed, mixed_window(step))
    assert same_weights(straight, resumed) and not same_weights(straight, first)
    assert resumed.optimizer.updates == straight.optimizer.updates
    assert resumed.entropy == straight.entropy
    if words.kl_coefficient > 0:
        assert resumed.entropy != first.entropy != build_trainer(topology, float).entropy
        began = AutoModelForCausalLM.from_pretrained(student).state_dict()
        held = resumed.reference.model.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(tensor, began[name]) for name, tensor in held.items())
    pairs = zip(straight.optimizer.tensors(), resumed.optimizer.tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.slow
def test_the_model_of_a_checkpoint_opens_with_transformers(tmp_path: Path) -> None:
    topology = topology_of(saved_student(tmp_path / "student", torch.bfloat16), "bfloat16")
    trainer = build_trainer(topology, float)
    train_step(trainer, mixed_window())
    save_share(trainer, checkpoint.begin(tmp_path, 1), step=1)
    folder = checkpoint.commit(tmp_path, 1) / checkpoint.MODEL
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    own = trainer.policy.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(STUDENT).get_vocab()
    )


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_the_topology_is_refused(tmp_path: Path) -> None:
    topology = topology_of(saved_student(tmp_path / "student", torch.float32), "float32")
    save_share(build_trainer(topology, float), checkpoint.begin(tmp_path, 1), step=1)
    folder = checkpoint.commit(tmp_path, 1)
    changed = msgspec.structs.replace(topology, optimizer=OptimizerConfig(state_dtype="bfloat16"))
    with pytest.raises(UserError) as error:
        build_trainer(changed, float, folder)
    assert str(error.value).startswith(
        f"{folder}: the trainer cannot continue from this checkpoint: optimizer state "
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere/student", "float32", "cpu"), "student.model: cannot load 'nowhere/student': "),
        (
            (str(STUDENT), "float16", "cpu"),
            "student.dtype: float16 cannot be trained; expected one of float32, bfloat16",
        ),
        ((str(STUDENT), "float32", "abacus"), "actors.trainer.device: cannot use 'abacus': "),
    ],
)
def test_a_student_that_cannot_be_trained_is_one_sentence(
    arguments: tuple[str, str, str], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load_model(*arguments)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)
