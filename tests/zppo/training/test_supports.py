"""Truncated sampling in the trainer: rows of supports in micro-batches, and one update written out
longhand over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor
from training_cases import (
    CPU,
    MODELS,
    VOCABULARY,
    group,
    method,
    trainer_of,
    window,
)

from zppo.training.batch import Reach, assemble
from zppo.training.layout import deal_passes
from zppo.training.step import train_step
from zppo.training.surrogate import step_advantages
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.support import support_of
from zppo_protocol.values import FROZEN


def truncated(task: TrainWindow, seed: int, widest: int = 6) -> TrainWindow:
    """The window with a random support around each token of a policy; what is frozen has none."""
    random = np.random.default_rng(seed)

    def row(token: int, version: int) -> np.ndarray:
        if version == FROZEN:
            return np.zeros(0, np.int32)
        others = random.permutation(VOCABULARY)[: int(random.integers(0, widest))]
        return np.unique([token, *others]).astype(np.int32)

    def cut(one: TrainGroup) -> TrainGroup:
        samples = one.samples
        rows = [row(*pair) for pair in zip(samples.token_ids, samples.versions_T, strict=True)]
        return structs.replace(one, samples=structs.replace(samples, support=support_of(rows)))

    return structs.replace(task, groups=[cut(one) for one in task.groups])


def rows_of(samples: GroupSamples) -> list[list[int]]:
    """The support of each token."""
    assert samples.support is not None
    parts = np.split(samples.support.ids, samples.support.offsets[1:-1])
    return [part.tolist() for part in parts[: len(samples.token_ids)]]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    max_tokens=st.integers(1, 60),
    cut=st.lists(st.booleans(), min_size=4, max_size=4),
    context=st.sampled_from([10, 2**31]),
)
def test_every_token_of_a_micro_batch_has_its_support(
    lengths: list[list[int]], max_tokens: int, cut: list[bool], context: int
) -> None:
    """Whether or not the other groups have one, and with rollouts that the model cannot read."""
    plain = [group(f"g{i}", [0.0] * len(part), lengths=part) for i, part in enumerate(lengths)]
    groups = [
        truncated(window(one), seed=i).groups[0] if keep else one
        for i, (one, keep) in enumerate(zip(plain, cut, strict=False))
    ]
    rollouts = assemble(window(*groups), max_staleness=0, device=CPU, reach=Reach(context=context))
    wanted = [
        row
        for one in rollouts.groups
        for row in (
            rows_of(one.samples) if one.samples.support else [[]] * len(one.samples.token_ids)
        )
    ]
    everyone = np.arange(rollouts.sequences)
    for batch in deal_passes(rollouts, everyone, max_tokens, share=True).batches:
        rows = [wanted[token] for token in batch.tokens_R.tolist()]
        if batch.support_RK is None:
            assert not any(rows)
            continue
        assert batch.support_RK.shape == (len(rows), max(map(len, rows)))
        assert [[i for i in row if i >= 0] for row in batch.support_RK.tolist()] == rows


def longhand_log_probs(model: Any, samples: GroupSamples, index: int) -> Tensor:
    """Log-probs of one completion over its tokens' supports, from a forward pass of its own."""
    part = slice(int(samples.offsets[index]), int(samples.offsets[index + 1]))
    ids = torch.from_numpy(np.concatenate([samples.prompt_ids, samples.token_ids[part]])).long()
    logits_TV = model(input_ids=ids[None]).logits[0, len(samples.prompt_ids) - 1 : -1].double()
    inside_TV = torch.zeros_like(logits_TV, dtype=torch.bool)
    for place, row in enumerate(rows_of(samples)[part]):
        inside_TV[place, row or slice(None)] = True
    log_probs_TV = torch.where(inside_TV, logits_TV, -torch.inf).log_softmax(-1)
    return log_probs_TV.gather(-1, ids[len(samples.prompt_ids) :, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_one_update_is_the_papers_loss_over_the_supports(make: Any) -> None:
    """With a teacher's rollout in one of the groups, whose tokens weigh 1 and have no support. The
    behaviour log-probs are near the model's own."""
    random, models = np.random.default_rng(0), (make(), make())
    spans = [(3, FROZEN), (5, 0)]
    task = truncated(
        window(
            group("a", [1, 0, 0], lengths=[3, 2, 3], spans=spans), group("b", [1, 0, 1, 0], seed=1)
        ),
        seed=5,
    )
    groups = []
    for one in task.groups:
        exact = [
            longhand_log_probs(models[0], one.samples, i).detach() for i in range(len(one.rewards))
        ]
        noise = random.normal(0.0, 0.3, len(one.samples.token_ids))
        drawn = np.minimum(torch.cat(exact).numpy() + noise, 0.0).astype(np.float32)
        groups.append(structs.replace(one, samples=structs.replace(one.samples, log_probs=drawn)))
    task = window(*groups)

    words = method(updates_per_step=1)
    metrics = train_step(trainer_of(models[0], method=words), task)

    rollouts = assemble(task, max_staleness=0, device=CPU)
    advantages = step_advantages(rollouts, [np.arange(rollouts.sequences)], words).double()
    terms, gaps, sequence = [], [], 0
    for one in task.groups:
        for index in range(len(one.rewards)):
            part = slice(int(one.samples.offsets[index]), int(one.samples.offsets[index + 1]))
            policy = longhand_log_probs(models[1], one.samples, index)
            behaviour = torch.from_numpy(one.samples.log_probs[part]).double()
            sampled = torch.from_numpy(one.samples.versions_T[part] != FROZEN)
            log_weight = torch.where(sampled, policy.detach() - behaviour, 0.0)
            gaps.append(log_weight.abs())
            weight = log_weight.exp().clamp(max=words.correction_cap)
            terms.append(-weight * (policy - policy.detach()).exp() * advantages[sequence])
            sequence += 1
    loss = torch.cat(terms).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["log_prob_gap_max"] == pytest.approx(float(torch.cat(gaps).max()), abs=1e-4)
