"""Members of a group that sampled the same tokens so far are one branch of the decoder: what each
samples, and with which log-probs, is what it samples alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import VOCABULARY, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_actors.engines.sequences import Completion, Running
from zppo_actors.engines.transformers.decoder import Decoder
from zppo_actors.engines.transformers.models import adopt_slots
from zppo_actors.engines.uniforms import UniformStream
from zppo_protocol.values import Sampling

ROUNDING = 1e-4
END = 5


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model that is sure of some tokens and not of others, and a copy of it with our
    attention."""
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12.0)
    served = copy.deepcopy(model)
    adopt_slots(served, "a tiny model", "student.model")
    return model, served


def members(length: int, count: int, tokens: int, temperature: float = 1.0) -> list[Running]:
    """A group; its second member may have fewer tokens than the others."""
    prompt = np.arange(length, dtype=np.int32) * 7 % VOCABULARY
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature)
    return [
        Running(prompt, sampling, tokens - 2 * (index == 1), index, UniformStream(length, index))
        for index in range(count)
    ]


def to_the_end(decoder: Decoder, branches: list[int] | None = None) -> list[Any]:
    ended = []
    while decoder.running:
        if branches is not None:
            branches.append(len(decoder._tokens_B))
        ended += decoder.step()
    return ended


def expected_tokens(model: Any, sequence: Running, completion: Completion) -> tuple[Any, Any]:
    """Tokens and log-probs of one response by plain forward passes and the definition of the
    inverse CDF, in float64. Ties of a token's edge with the random number are not decided: such a
    token is taken as it was sampled."""
    ids = torch.tensor([[*sequence.prompt_ids.tolist(), *completion.token_ids.tolist()]])
    logits_LV = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
    first = len(sequence.prompt_ids) - 1
    log_probs_TV = (logits_LV[first:] / sequence.sampling.temperature).log_softmax(-1)
    uniforms = UniformStream(len(sequence.prompt_ids), sequence.index).take(len(log_probs_TV))
    tokens = []
    for token, log_probs_V, uniform in zip(
        completion.token_ids.tolist(), log_probs_TV, uniforms.tolist(), strict=True
    ):
        cumulative_V = log_probs_V.exp().cumsum(0)
        near = bool(((cumulative_V - uniform).abs() < ROUNDING).any())
        tokens.append(token if near else int((cumulative_V > uniform).nonzero()[0]))
    chosen_T = torch.tensor(completion.token_ids.astype(np.int64))[:, None]
    return tokens, log_probs_TV.gather(1, chosen_T)[:, 0].numpy()


@torch.inference_mode()
def check(model: Any, ended: list[Any]) -> None:
    for sequence, completion in ended:
        tokens, log_probs = expected_tokens(model, sequence, completion)
        assert completion.token_ids.tolist() == tokens
        np.testing.assert_allclose(completion.log_probs, log_probs, atol=ROUNDING)
        stopped = completion.token_ids[-1] == END
        assert stopped or len(completion.token_ids) == sequence.budget
        assert not (completion.token_ids[:-1] == END).any()


@torch.inference_mode()
def test_branches_part_where_members_sample_other_tokens(models: tuple[Any, Any]) -> None:
    model, served = models
    decoder = Decoder(served, frozenset({END}), max_rows=40, max_length=64)
    decoder.admit([members(9, 16, 24), members(4, 16, 24)])
    branches: list[int] = []
    ended = to_the_end(decoder, branches)
    check(model, ended)
    assert branches[0] == 2 and max(branches) > 2
    steps = sum(len(completion.token_ids) for _, completion in ended)
    prefixes = {
        (len(sequence.prompt_ids), *completion.token_ids[:end].tolist())
        for sequence, completion in ended
        for end in range(len(completion.token_ids))
    }
    # The model reads what is before each token once for all who share it.
    assert sum(branches) == len(prefixes) < steps


@torch.inference_mode()
def test_greedy_members_stay_one_branch(models: tuple[Any, Any]) -> None:
    _, served = models
    decoder = Decoder(served, frozenset({-1}), max_rows=8, max_length=64)
    decoder.admit([members(6, 8, 20, temperature=0.0)])
    branches: list[int] = []
    ended = to_the_end(decoder, branches)
    assert branches == [1] * 20
    assert len({tuple(completion.token_ids.tolist()[:18]) for _, completion in ended}) == 1


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
@torch.inference_mode()
def test_groups_that_come_and_go_at_any_time(models: tuple[Any, Any], data: st.DataObject) -> None:
    """Groups are admitted while others run, members are dropped, buffers grow."""
    model, served = models
    decoder = Decoder(served, frozenset({END}), max_rows=12, max_length=64)
    ended, lengths = [], iter((9, 1, 30, 2, 17, 9))
    for length in lengths:
        count = data.draw(st.integers(1, 5))
        if count <= decoder.free:
            decoder.admit([members(length, count, data.draw(st.integers(3, 30)))])
        for _ in range(data.draw(st.integers(0, 6))):
            if decoder.running:
                ended += decoder.step()
        unwanted = data.draw(st.integers(-1, 4))
        if data.draw(st.booleans()):
            decoder.drop(lambda sequence, unwanted=unwanted: sequence.index == unwanted)
    check(model, ended + to_the_end(decoder))
