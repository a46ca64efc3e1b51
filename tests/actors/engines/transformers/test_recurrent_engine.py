"""Models that carry a state from token to token, against unpadded forward passes of transformers,
one sequence at a time."""

from __future__ import annotations

import asyncio
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    completions,
    forced_log_probs,
    make_task,
    make_tokenizer,
    versions,
    words,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recurrent_models import FAMILIES, make_recurrent, make_seeing, save_seeing
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, DynamicCache
from transformers_helpers import build, run, sample

from zppo.plan.architecture import attending_layers, state_numbers
from zppo.prompting.picture_families import unsampled_ids
from zppo_actors.engines.sequences import Running
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.transformers import decoder
from zppo_actors.engines.transformers.engine import TransformersEngine
from zppo_actors.engines.transformers.models import adopt_slots
from zppo_actors.engines.transformers.slots import SlotLayer
from zppo_actors.engines.uniforms import UniformStream
from zppo_actors.weights import shared_memory
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Sampling

pytestmark = pytest.mark.slow

ROUNDING = 1e-4
LENGTHS = (1, 2, 19, 5, 40, 19)


def adopted(model: Any) -> Any:
    """A copy with our attention."""
    copied = copy.deepcopy(model)
    adopt_slots(copied, "a tiny model", "student.model")
    return copied


def serve(model: Any, folder: Path, max_sequences: int) -> TransformersEngine:
    """An engine for a model of `adopted`."""
    make_tokenizer().save_pretrained(folder)
    tokenizer = PromptTokenizer(str(folder), "student.model")
    return TransformersEngine(model, tokenizer, max_sequences, max_length=256)


def difference(model: Any, found: list[GroupSamples]) -> float:
    """Largest difference of a sampled token's log-prob from a plain forward pass."""
    return max(
        float(np.abs(forced_log_probs(model, group) - group.log_probs).max()) for group in found
    )


def tasks_of(lengths: tuple[int, ...] | list[int], n: int, tokens: int) -> list[Any]:
    """Groups of `n`, the i-th with a prompt of `lengths[i]` tokens and other bounds of length."""
    return [
        make_task(
            words(length, start=i), n=n, task_id=f"t{i}", seed=i, max_new_tokens=tokens + 3 * i
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_come_and_go_and_each_is_as_if_it_were_alone(family: str, tmp_path: Path) -> None:
    """More sequences than slots, so that slots are used again, and groups are admitted in parts."""
    model = make_recurrent(family)
    engine = serve(adopted(model), tmp_path, max_sequences=5)
    found = run(engine, sample(engine, *tasks_of(LENGTHS, 3, 6)))
    assert difference(model, found) < ROUNDING
    assert [len(completions(group)) for group in found] == [3] * len(LENGTHS)


@pytest.mark.parametrize("family", [*FAMILIES, "olmo_hybrid", "jamba", "lfm2", "llama"])
def test_the_plan_counts_what_a_row_holds(family: str) -> None:
    """What is read from the configuration alone, against the buffers themselves."""
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    text, layers = model.config.to_dict(), model.config.num_hidden_layers
    cache = decoder.Decoder(model, frozenset({-1}), max_rows=1, max_length=8)._cache
    buffers = [
        buffer
        for layer in cache.state_layers
        for of_kind in (layer._inputs, layer._states)
        for buffer in of_kind.values()
    ]
    held = sum(math.prod(buffer.shape[1:]) for buffer in buffers)
    assert state_numbers(text, layers) == held
    attending = sum(isinstance(layer, SlotLayer) for layer in cache.slot_layers)
    assert attending_layers(text, layers) == attending


def test_a_model_with_a_tower_is_sampled_under_its_own_names(tmp_path: Path) -> None:
    model = make_seeing()
    engine = build(save_seeing(model, tmp_path), max_sequences=5)
    assert type(engine._model) is type(model)
    found = run(engine, sample(engine, *tasks_of(LENGTHS, 2, 6)))
    assert difference(model, found) < ROUNDING


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A model, its copy in an engine, and a folder for the tokenizer."""
    model = make_recurrent("qwen3_5_text")
    return model, adopted(model), tmp_path_factory.mktemp("tokenizer")


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    n=st.integers(1, 3),
    tokens=st.integers(1, 12),
    slots=st.integers(1, 6),
)
@example(lengths=[1, 1, 1, 6], n=3, tokens=1, slots=5)
def test_any_order_of_arrivals_gives_the_same_log_probs(
    lengths: list[int], n: int, tokens: int, slots: int, both: tuple[Any, Any, Path]
) -> None:
    """Against float64, from which a plain pass in float32 may be far off as well: a norm of next to
    nothing magnifies what rounding leaves."""
    model, copied, folder = both
    exact = copy.deepcopy(model).double()
    engine = serve(copied, folder, max_sequences=slots)
    for group in run(engine, sample(engine, *tasks_of(lengths, n, tokens))):
        expected = forced_log_probs(exact, group)
        rounding = np.abs(forced_log_probs(model, group) - expected).max()
        assert np.abs(group.log_probs - expected).max() < ROUNDING + 2 * rounding


@torch.inference_mode()
def test_after_a_failure_nothing_of_the_old_states_is_left(both: tuple[Any, Any, Path]) -> None:
    """Prompts of one token read nothing, so their states must be zeroed, not filled."""
    model, copied, _ = both
    decoding = decoder.Decoder(copied, frozenset({-1}), max_rows=4, max_length=64)

    def group(length: int) -> list[Running]:
        prompt = np.arange(3, 3 + length, dtype=np.int32)
        sampling = Sampling(max_new_tokens=8)
        return [Running(prompt, sampling, 8, i, UniformStream(length, i)) for i in range(2)]

    decoding.admit([group(9), group(4)])
    for _ in range(3):
        decoding.step()
    decoding.reset()
    decoding.admit([group(1)])
    decoding.step()
    decoding.drop(lambda sequence: sequence.index == 0)
    decoding.admit([group(1)])
    ended = []
    while decoding.running:
        ended += decoding.step()
    assert len(ended) == 3
    for sequence, completion in ended:
        ids = torch.tensor([[*sequence.prompt_ids, *completion.token_ids]], dtype=torch.int64)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(completion.log_probs, expected.numpy(), atol=ROUNDING)


def test_padding_would_leave_its_trace_in_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths in one pass are what the tests above would notice."""
    model = make_recurrent("qwen3_5_text")
    engine = serve(adopted(model), tmp_path, max_sequences=18)
    cut = decoder._batches
    monkeypatch.setattr(decoder, "_batches", lambda groups, *, equal: cut(groups, equal=False))
    found = run(engine, sample(engine, *tasks_of(LENGTHS, 3, 6)))
    assert difference(model, found) > 100 * ROUNDING


def continued_log_probs(old: Any, new: Any, group: GroupSamples) -> np.ndarray:
    """Log-probs [T] where each sequence goes on under `new` with what `old` has left in the cache
    of transformers itself."""
    parts, before = [], np.array(versions(group))
    unsampled = list(unsampled_ids(old.config.to_dict()))
    for tokens, of_version in zip(
        completions(group), np.split(before, group.offsets[1:-1]), strict=True
    ):
        cache = DynamicCache(config=old.config.get_text_config())
        inputs = [*group.prompt_ids.tolist(), *tokens][:-1]
        first, logits = len(group.prompt_ids) - 1, []
        if first:
            old(input_ids=torch.tensor([inputs[:first]]), past_key_values=cache, use_cache=True)
        for token, version in zip(inputs[first:], of_version, strict=True):
            model = new if version > 0 else old
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
        logits_TV = torch.stack(logits)
        logits_TV[:, unsampled] = -torch.inf
        log_probs = logits_TV.log_softmax(-1)
        parts.append(log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("make", [lambda seed: make_recurrent("qwen3_5_text", seed), make_seeing])
def test_states_stay_where_they_are_when_new_weights_come(make: Any, tmp_path: Path) -> None:
    old, new = make(0), make(1)
    for model in (old, new):  # so that no sequence ends before the weights come
        model.get_output_embeddings().weight[2] = 0.0
    engine = serve(adopted(old), tmp_path / "tokenizer", max_sequences=8)
    manifest = shared_memory.publish(new.state_dict(), 1, tmp_path)

    async def updated() -> list[GroupSamples]:
        running = asyncio.gather(
            *(
                engine.generate(make_task(words(length), n=2, seed=length, max_new_tokens=60))
                for length in (1, 3, 17)
            )
        )
        while engine.progress < 40:
            await asyncio.sleep(0.001)
        await engine.load_policy(manifest)
        fresh = await engine.generate(make_task(words(9), n=2, max_new_tokens=20))
        return [*await running, fresh]

    *running, fresh = run(engine, updated())
    assert set(versions(fresh)) == {1}
    assert difference(new, [fresh]) < ROUNDING
    assert {0, 1} == {version > 0 for group in running for version in versions(group)}
    for group in running:
        expected = continued_log_probs(old, new, group)
        # States of the old weights under the new ones round by more, 2.3e-4 in one of many runs.
        np.testing.assert_allclose(group.log_probs, expected, atol=10 * ROUNDING)
