"""The transformers engine against plain forward passes of the same model."""

from __future__ import annotations

import asyncio
import copy
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    END_ID,
    MODELS,
    completions,
    forced_log_probs,
    make_model,
    make_task,
    make_tokenizer,
    save,
    versions,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from transformers import RecurrentGemmaConfig
from transformers_helpers import build, run, sample

from zppo.errors import UserError
from zppo.prompting.tokenization import encode_prompts
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.transformers import decoder
from zppo_actors.engines.transformers.engine import TransformersEngine
from zppo_actors.engines.transformers.models import adopt_slots
from zppo_actors.engines.transformers.sampling import Sampler
from zppo_actors.engines.uniforms import LARGEST_UNIFORM, UniformStream
from zppo_actors.weights import PublicationRefused, shared_memory
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Sampling

NO_END = 10_000
"""Far more tokens than the tiny context holds: responses end by themselves or with the context."""


def serve(model: Any, folder: Path, max_sequences: int = 64) -> TransformersEngine:
    """An engine for a copy of `model`; the tokenizer folder names no architecture, which would
    change its class."""
    make_tokenizer().save_pretrained(folder)
    copied = copy.deepcopy(model)
    adopt_slots(copied, "a tiny model", "student.model")
    tokenizer = PromptTokenizer(str(folder), "student.model")
    return TransformersEngine(copied, tokenizer, max_sequences, max_length=256)


def never_ending(seed: int = 0) -> Any:
    """A model whose end token has logit 0 where others reach far above, so that greedy lengths are
    those asked for."""
    model = make_model("llama", seed=seed, tie_word_embeddings=False)
    model.lm_head.weight[END_ID] = 0.0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    engine = serve(model, tmp_path)
    tasks = [
        make_task(words(length, start=length), temperature=0.0, max_new_tokens=24)
        for length in (1, 2, 5, 40)
    ]
    for samples in run(engine, sample(engine, *tasks)):
        prompt = torch.from_numpy(samples.prompt_ids.astype(np.int64))[None]
        expected = model.generate(
            prompt, do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(prompt)
        )
        assert completions(samples) == [expected[0, prompt.shape[1] :].tolist()]
        assert abs(forced_log_probs(model, samples) - samples.log_probs).max() < 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_are_those_of_a_forced_forward_pass(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    engine = serve(model, tmp_path, max_sequences=7)
    tasks = [
        make_task(words(3 + 5 * i), n=4, seed=i, max_new_tokens=40, temperature=0.8)
        for i in range(5)
    ]
    for samples in run(engine, sample(engine, *tasks)):
        assert (
            abs(forced_log_probs(model, samples, temperature=0.8) - samples.log_probs).max() < 1e-4
        )


def test_end_token_is_kept_and_texts_leave_it_out(folder: Path) -> None:
    engine = build(folder)
    [samples] = run(
        engine, sample(engine, make_task(words(4), n=16, max_new_tokens=NO_END, seed=3))
    )
    assert samples.finish_reasons.count("stop") > 0
    for token_ids, text, reason in zip(
        completions(samples), samples.texts, samples.finish_reasons, strict=True
    ):
        body = token_ids[:-1] if reason == "stop" else token_ids
        assert (token_ids[-1] == END_ID) == (reason == "stop") and END_ID not in body
        assert text.split() == [f"w{i}" if i > 2 else "" for i in body if i > 2]


def test_samples_depend_on_the_seed_alone_not_on_company_or_slots(folder: Path) -> None:
    task = make_task(words(6), n=3, seed=11, max_new_tokens=30)
    company = [
        make_task(words(9 + i), n=4, seed=i, max_new_tokens=5 + 9 * i, top_p=0.9 if i % 2 else 1.0)
        for i in range(6)
    ]
    alone, crowded = build(folder), build(folder, max_sequences=5)
    [expected] = run(alone, sample(alone, task))
    *_, found = run(crowded, sample(crowded, *company, task))
    assert completions(found) == completions(expected)
    assert abs(found.log_probs - expected.log_probs).max() < 1e-4
    assert len({tuple(token_ids) for token_ids in completions(expected)}) == 3


def test_truncated_sampling_stays_inside_and_is_renormalised(folder: Path) -> None:
    engine = build(folder)
    task = make_task(words(5), n=64, seed=1, max_new_tokens=1, top_k=5, top_p=0.7, temperature=1.3)
    plain = make_task(words(5), n=64, seed=1, max_new_tokens=1)
    samples, _ = run(engine, sample(engine, task, plain))
    logits = (
        make_model()(input_ids=torch.from_numpy(samples.prompt_ids.astype(np.int64))[None]).logits[
            0, -1
        ]
        / 1.3
    )
    probs, order = logits.softmax(-1).sort(descending=True)
    probs = probs[:5] / probs[:5].sum()
    kept = int((probs.cumsum(0) - probs < 0.7).sum())
    expected = {int(order[i]): float(torch.log(probs[i] / probs[:kept].sum())) for i in range(kept)}
    assert set(samples.token_ids.tolist()) <= set(expected) and kept > 1
    for token, log_prob in zip(samples.token_ids.tolist(), samples.log_probs.tolist(), strict=True):
        assert log_prob == pytest.approx(expected[token], abs=1e-4)


def test_presence_penalty_counts_what_the_response_holds_and_nothing_else(folder: Path) -> None:
    """Against a plain loop, in the company of rows without a penalty that come and go."""
    engine = build(folder, max_sequences=6)
    penalised = make_task(
        words(8), n=2, seed=5, max_new_tokens=24, presence_penalty=1.5, temperature=0.7
    )
    company = [make_task(words(4 + i), n=2, seed=i, max_new_tokens=3 + 5 * i) for i in range(4)]
    *_, samples = run(engine, sample(engine, *company, penalised))
    model, prompt = make_model(), torch.from_numpy(samples.prompt_ids.astype(np.int64))
    parts = np.split(samples.log_probs, samples.offsets[1:-1])
    for token_ids, log_probs in zip(completions(samples), parts, strict=True):
        tokens = torch.tensor(token_ids)
        logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        for position, token in enumerate(token_ids):
            penalty = torch.zeros(logits.shape[-1])
            penalty[tokens[:position].unique()] = 1.5
            expected = ((logits[position] - penalty) / 0.7).log_softmax(-1)[token]
            assert log_probs[position] == pytest.approx(float(expected), abs=1e-3)


def test_prompts_of_many_lengths_are_read_in_several_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 48)
    engine = build(folder)
    tasks = [
        make_task(words(length, start=length), n=2, seed=length)
        for length in (60, 1, 7, 30, 2, 20, 13)
    ]
    for samples in run(engine, sample(engine, *tasks)):
        assert abs(forced_log_probs(make_model(), samples) - samples.log_probs).max() < 1e-4


def test_prompt_of_the_chat_template(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    template = (
        "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}{% if add_generation_prompt "
        "%}w8{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = PromptTokenizer(str(tmp_path), "student.model")
    assert tokenizer.encode(make_task("w20 w21").prompt).tolist() == [9, 20, 21, 8]
    assert PromptTokenizer(str(folder), "student.model").encode(
        make_task("w20 w21").prompt
    ).tolist() == [20, 21]


def test_variables_reach_the_chat_template(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if enable_thinking %}w8{% else "
        "%}w9{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = PromptTokenizer(str(tmp_path), "student.model")
    prompts = [
        structs.replace(make_task("w20").prompt, chat_template_kwargs={"enable_thinking": on})
        for on in (True, False)
    ]
    assert [tokenizer.encode(prompt).tolist() for prompt in prompts] == [[20, 8], [20, 9]]
    mixed = [prompts[0], prompts[1], prompts[0]]
    assert encode_prompts(tokenizer._tokenizer, mixed) == [[20, 8], [20, 9], [20, 8]]


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(0, 9), max_size=6),
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 99),
)
def test_random_numbers_do_not_depend_on_how_they_are_cut(
    cuts: list[int], seed: int, index: int
) -> None:
    whole = UniformStream(seed, index).take(sum(cuts))
    stream = UniformStream(seed, index)
    parts = [stream.take(count) for count in cuts]
    assert torch.equal(torch.cat([torch.zeros(0), *parts]), whole)


SETTINGS = st.builds(
    Sampling,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 4, 100]),
)


@settings(deadline=None)
@given(rows=st.lists(SETTINGS, min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_rows_of_the_sampler_do_not_see_each_other(rows: list[Sampling], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(len(rows), 20, generator=generator)
    uniforms = torch.rand(len(rows), generator=generator).clamp(max=LARGEST_UNIFORM)
    tokens, log_probs = Sampler(rows, torch.device("cpu"))(logits, uniforms)
    assert bool((log_probs <= 0.0).all()) and bool(log_probs.isfinite().all())
    for row, setting in enumerate(rows):
        alone = Sampler([setting], torch.device("cpu"))(
            logits[row : row + 1], uniforms[row : row + 1]
        )
        assert alone[0] == tokens[row] and alone[1] == log_probs[row]


@pytest.mark.slow
def test_quickstart_student_writes_answers_in_boxes() -> None:
    folder = Path(__file__).parents[4] / "examples" / "quickstart" / "student"
    engine = build(folder)
    task = make_task("3 * 17 * 5 mod 23 ?\nanswer in \\boxed{ }", n=32, max_new_tokens=24)
    [samples] = run(engine, sample(engine, task))
    assert (
        sum("\\boxed{" in text for text in samples.texts) > 16
        and samples.finish_reasons.count("stop") > 16
    )


@pytest.mark.slow
def test_frequencies_follow_the_model(folder: Path) -> None:
    engine = build(folder, max_sequences=512)
    [samples] = run(engine, sample(engine, make_task(words(5), n=4096, seed=5, max_new_tokens=1)))
    logits = make_model()(
        input_ids=torch.from_numpy(samples.prompt_ids.astype(np.int64))[None]
    ).logits[0, -1]
    found = (
        torch.bincount(torch.from_numpy(samples.token_ids.astype(np.int64)), minlength=40) / 4096
    )
    assert float((found - logits.softmax(-1)).abs().max()) < 0.03


def test_late_task_is_admitted_while_a_long_one_runs(tmp_path: Path) -> None:
    engine = build(save(never_ending(), tmp_path), max_sequences=2)

    async def work() -> list[str]:
        order: list[str] = []

        async def one(name: str, tokens: int, seen: asyncio.Event | None = None) -> None:
            task = make_task(words(4), task_id=name, max_new_tokens=tokens, temperature=0.0)
            await engine.generate(task, lambda count: seen.set() if seen else None)
            order.append(name)

        first_ended = asyncio.Event()
        early = [
            asyncio.create_task(one("long", 200)),
            asyncio.create_task(one("short", 3, first_ended)),
        ]
        await first_ended.wait()
        await asyncio.gather(*early, one("late", 3))
        return order

    assert run(engine, work()) == ["short", "late", "long"]


def test_room_is_reported_for_each_sequence_before_the_group_is_done(folder: Path) -> None:
    engine = build(folder, max_sequences=3)
    ended: list[int] = []

    async def work() -> None:
        await engine.generate(make_task(words(4), n=10, seed=2, max_new_tokens=60), ended.append)

    run(engine, work())
    assert sum(ended) == 10 and len(ended) > 1


def test_new_weights_in_mid_sentence_are_stamped_and_followed(tmp_path: Path) -> None:
    old, new = never_ending(seed=0), never_ending(seed=1)
    engine = build(save(old, tmp_path / "model"))

    async def work() -> GroupSamples:
        await engine.load_policy(shared_memory.publish(old.state_dict(), 4, tmp_path))
        running = asyncio.create_task(
            engine.generate(make_task(words(4), n=2, max_new_tokens=250, temperature=0.0))
        )
        while engine.progress < 20:
            await asyncio.sleep(0)
        manifest = shared_memory.publish(new.state_dict(), 5, tmp_path)
        assert await engine.load_policy(manifest) == manifest.digest
        return await running

    samples = run(engine, work())
    assert engine.policy_version == 5
    of_token = versions(samples)
    for start, token_ids in zip((0, samples.offsets[1]), completions(samples), strict=True):
        stamped = of_token[start : start + len(token_ids)]
        change = stamped.index(5)
        assert stamped == [4] * change + [5] * (len(token_ids) - change) and change >= 10
        assert expected_with_change(old, new, samples.prompt_ids.tolist(), token_ids, change)


def expected_with_change(
    old: Any, new: Any, prompt: list[int], token_ids: list[int], change: int
) -> bool:
    """Greedy decoding by hand: keys and values of the old weights stay, tokens from `change` on are
    the new model's."""
    tokens = torch.tensor([prompt + token_ids])
    boundary = len(prompt) + change - 1
    past = old(input_ids=tokens[:, :boundary], use_cache=True)
    logits = new(input_ids=tokens[:, boundary:-1], past_key_values=past.past_key_values).logits
    picked = torch.cat([past.logits, logits], dim=1).argmax(-1)[0, len(prompt) - 1 :]
    return picked.tolist() == token_ids


def test_bad_publication_is_refused_and_the_old_policy_serves_on(
    folder: Path, tmp_path: Path
) -> None:
    engine = build(folder)

    async def work() -> list[GroupSamples]:
        await engine.load_policy(
            shared_memory.publish(make_model(seed=1).state_dict(), 1, tmp_path)
        )
        bad = shared_memory.publish({"model.norm.weight": torch.ones(32)}, 2, tmp_path)
        with pytest.raises(PublicationRefused, match="is missing"):
            await engine.load_policy(bad)
        return await sample(engine, make_task(words(4), n=2))

    [samples] = run(engine, work())
    assert set(versions(samples)) == {1}
    assert abs(forced_log_probs(make_model(seed=1), samples) - samples.log_probs).max() < 1e-4


def test_prompts_that_cannot_work_are_refused_for_good(folder: Path) -> None:
    engine = build(folder, max_length=32)

    async def work() -> list[GroupSamples]:
        with pytest.raises(
            EngineError, match="the prompt has 32 tokens, which leaves no room in a context of 32"
        ) as e:
            await engine.generate(make_task(words(32)))
        assert not e.value.retryable
        return await sample(engine, make_task(words(30), n=4, max_new_tokens=NO_END, seed=1))

    [samples] = run(engine, work())
    assert all(len(token_ids) <= 2 for token_ids in completions(samples))
    assert "length" in samples.finish_reasons


def test_failure_of_the_loop_fails_running_tasks_and_the_engine_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(folder)
    step, faults = engine._decoder.step, [torch.OutOfMemoryError("no memory"), None]

    def faulty() -> Any:
        if faults and (fault := faults.pop(0)) is not None:
            raise fault
        return step()

    monkeypatch.setattr(engine._decoder, "step", faulty)

    async def work() -> list[GroupSamples]:
        with pytest.raises(
            EngineError, match="out of memory with up to 64 sequences of up to 256 tokens"
        ) as caught:
            await engine.generate(make_task(words(4), n=3))
        assert caught.value.retryable and engine.broken is None
        return await sample(engine, make_task(words(4), n=3, seed=7))

    [samples] = run(engine, work())
    assert abs(forced_log_probs(make_model(), samples) - samples.log_probs).max() < 1e-4


def test_engine_that_keeps_failing_says_that_it_is_broken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(folder)

    def fail() -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._decoder, "step", fail)

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(EngineError, match="RuntimeError: device lost"):
                await engine.generate(make_task(words(4)))
        with pytest.raises(EngineError, match="3 times in a row"):
            await engine.generate(make_task(words(4)))

    run(engine, work())
    assert (
        engine.broken
        == "the engine failed 3 times in a row; the last time: RuntimeError: device lost"
    )


@pytest.mark.parametrize("n", [3, 4, 9])
def test_group_that_fails_while_it_is_admitted_is_answered(
    n: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in part: a group is neither waiting nor running at that moment."""
    engine = build(folder, max_sequences=4)
    prefill, faults = engine._decoder._prefill, [torch.OutOfMemoryError("no memory")]

    def faulty(groups: Any) -> None:
        if faults:
            raise faults.pop()
        prefill(groups)

    monkeypatch.setattr(engine._decoder, "_prefill", faulty)

    async def work() -> list[GroupSamples]:
        with pytest.raises(EngineError, match="out of memory") as caught:
            await engine.generate(make_task(words(4), n=n))
        assert caught.value.retryable and engine.broken is None
        return await sample(engine, make_task(words(4), n=n, seed=7))

    [samples] = run(engine, work())
    assert len(completions(samples)) == n and not engine._unsettled
    assert abs(forced_log_probs(make_model(), samples) - samples.log_probs).max() < 1e-4


def test_weights_that_are_copied_half_way_break_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(save(never_ending(), tmp_path / "model"), max_sequences=2)
    manifest = shared_memory.publish(never_ending(seed=1).state_dict(), 5, tmp_path)
    copying, posted = threading.Event(), threading.Event()

    def torn(pairs: shared_memory.Pairs) -> None:
        pairs[0][0].copy_(pairs[0][1])
        copying.set()
        assert posted.wait(60.0)
        raise RuntimeError("device lost")

    monkeypatch.setattr(shared_memory, "copy", torn)

    async def work() -> None:
        running = asyncio.create_task(
            engine.generate(make_task(words(4), n=50, max_new_tokens=240))
        )
        while not engine.progress:
            await asyncio.sleep(0)
        loads = [asyncio.create_task(engine.load_policy(manifest)) for _ in range(2)]
        assert await asyncio.to_thread(copying.wait, 60.0)
        late = asyncio.create_task(engine.generate(make_task(words(4))))
        await asyncio.sleep(0)
        posted.set()
        for outcome in await asyncio.gather(running, *loads, late, return_exceptions=True):
            assert isinstance(outcome, EngineError) and outcome.retryable and str(outcome) == reason
        for call in (engine.generate(make_task(words(4))), engine.load_policy(manifest)):
            with pytest.raises(EngineError, match="failed half-way"):
                await call

    reason = "loading policy version 5 failed half-way: RuntimeError: device lost"
    run(engine, work())
    assert engine.broken == reason and engine.policy_version == -1


def test_cancellation_that_fails_is_a_failure_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(save(never_ending(), tmp_path), max_sequences=4)
    drop, faults = engine._decoder.drop, [RuntimeError("device busy")]

    def faulty(unwanted: Any) -> None:
        if faults:
            raise faults.pop()
        drop(unwanted)

    monkeypatch.setattr(engine._decoder, "drop", faulty)

    async def work() -> list[GroupSamples]:
        unwanted, other = (
            asyncio.create_task(engine.generate(make_task(words(4), n=50, max_new_tokens=240)))
            for _ in range(2)
        )
        while not engine.progress:
            await asyncio.sleep(0)
        unwanted.cancel()
        with pytest.raises(EngineError, match="RuntimeError: device busy"):
            await other
        assert engine.broken is None
        return await sample(engine, make_task(words(4), n=2, max_new_tokens=5))

    [samples] = run(engine, work())
    assert len(completions(samples)) == 2


def test_decoder_that_cannot_be_reset_breaks_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(folder)

    def fail() -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._decoder, "step", fail)
    monkeypatch.setattr(engine._decoder, "reset", fail)

    async def work() -> None:
        with pytest.raises(EngineError, match="RuntimeError: device lost"):
            await engine.generate(make_task(words(4)))
        with pytest.raises(
            EngineError, match="the decoder cannot be reset: RuntimeError: device lost"
        ):
            await engine.generate(make_task(words(4)))

    run(engine, work())
    assert engine.broken == "the decoder cannot be reset: RuntimeError: device lost"


def test_cancelled_task_frees_its_slots(tmp_path: Path) -> None:
    engine = build(save(never_ending(), tmp_path), max_sequences=2)

    async def work() -> GroupSamples:
        unwanted = asyncio.create_task(
            engine.generate(make_task(words(4), n=50, max_new_tokens=240))
        )
        while engine.progress < 4:
            await asyncio.sleep(0)
        unwanted.cancel()
        samples = await engine.generate(make_task(words(4), n=2, max_new_tokens=5))
        assert engine.progress < 50 * 240
        return samples

    assert len(completions(run(engine, work()))) == 2


@pytest.mark.parametrize(
    ("engine_args", "sentence"),
    [
        (
            {"max_sequence": 4},
            (
                "actors.rollout.engine_args.max_sequence: unknown engine argument (did you mean "
                "'max_sequences'?)"
            ),
        ),
        (
            {"max_sequences": 0},
            (
                "actors.rollout.engine_args.max_sequences is 0; expected a whole number of at "
                "least 1 and at most 65536"
            ),
        ),
        (
            {"max_length": "long"},
            (
                "actors.rollout.engine_args.max_length is 'long'; expected a whole number of at "
                "least 2, or null"
            ),
        ),
    ],
)
def test_engine_arguments_are_checked(
    engine_args: dict[str, Any], sentence: str, folder: Path
) -> None:
    with pytest.raises(UserError) as caught:
        build(folder, **engine_args)
    assert str(caught.value) == sentence


def test_tokenizer_without_an_end_token_is_a_user_error(tmp_path: Path) -> None:
    save(make_model(), tmp_path, end_token=None)
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    expected = (
        f"student.model: the tokenizer of {str(tmp_path)!r} has no end token, so no response would "
        "ever stop"
    )
    assert str(caught.value) == expected


def test_architecture_with_other_state_is_a_user_error(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    RecurrentGemmaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"keeps other state than .* \(recurrent\), which"):
        build(tmp_path)


def test_a_model_whose_rows_depend_on_the_longest_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one length do not show it."""
    model = make_model("llama")
    forward = model.model.forward

    def longest(**inputs: Any) -> Any:
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"].amax(0, keepdim=True)
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", longest)
    with pytest.raises(UserError) as caught:
        adopt_slots(model, "odd", "student.model")
    assert re.fullmatch(
        r"student\.model: the engine 'transformers' cannot serve 'odd': the log-prob of a token "
        r"differs by \d+\.\d{3} between decoding from slots and a plain forward pass \(less than "
        r"0\.01 is rounding\)",
        str(caught.value),
    )


def test_a_model_that_keeps_no_plain_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    forward = model.forward

    def forgetful(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(UserError) as caught:
        adopt_slots(model, "odd", "student.model")
    assert str(caught.value) == (
        "student.model: 'odd' (llama) keeps other state than a key-value cache (NoneType), which "
        "the engine 'transformers' does not serve"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_16_bits_is_no_other_computation(dtype: torch.dtype) -> None:
    adopt_slots(make_model("llama").to(dtype), "a tiny model", "student.model")
