"""The vLLM engine, for real, against plain forward passes of the same model: samples, updates in
flight, refusals.

One engine serves all tests, because it takes longer to start than all of them to run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import psutil
import pytest
import torch
from actor_helpers import Line
from engine_helpers import (
    END_ID,
    VOCABULARY,
    completions,
    forced_log_probs,
    make_model,
    make_task,
    save,
    versions,
    words,
)
from living import titled
from scoring_helpers import assert_scores, forward, to_score
from support_helpers import assert_supports, task_with_support, trainer_log_probs
from vllm_helpers import CONTEXT, save_tiny, spec_of, tiny, truncated_log_probs

from zppo.config.method import MethodConfig
from zppo.config.topology import (
    DataConfig,
    StudentConfig,
    StudentSampling,
    Topology,
)
from zppo.errors import UserError
from zppo_actors.engines import create
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.vllm.engine import read_support
from zppo_actors.process import ActorContext
from zppo_actors.sampler.actor import EngineActor
from zppo_actors.weights import PublicationRefused, shared_memory
from zppo_protocol.messages import (
    AnyMessage,
    Credits,
    GenerateResult,
    GenerateTask,
    Goodbye,
    LoadPolicy,
    PolicyLoaded,
    PolicyRefused,
    ScoreTask,
    TrainWindow,
    Welcome,
)
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup
from zppo_protocol.values import PolicyManifest, ResponseStart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TOLERANCE = 1e-3
CALL_SECONDS = 1800.0
Outcome = TypeVar("Outcome")
Answer = TypeVar("Answer")


class Served:
    """An engine, the loop it lives in, and the policies that it was given."""

    def __init__(self, engine: Any, runner: asyncio.Runner, folder: Path) -> None:
        self.engine = engine
        self.runner = runner
        self.folder = folder
        self.model: Any = None
        self.versions = 0

    def run(self, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        return self.runner.run(asyncio.wait_for(work, CALL_SECONDS))

    def publish(self, model: Any) -> PolicyManifest:
        """Publish `model` as the next version."""
        self.versions += 1
        return shared_memory.publish(model.state_dict(), self.versions, self.folder)

    def load(self, seed: int) -> None:
        """Make the tiny model of `seed` the policy."""
        self.take(tiny(seed))

    def take(self, model: Any) -> None:
        """Make `model` the policy."""
        manifest = self.publish(model)
        assert self.run(self.engine.load_policy(manifest)) == manifest.digest
        assert self.engine.policy_version == manifest.version
        self.model = model

    def sample(self, *tasks: GenerateTask) -> list[GroupSamples]:
        async def both() -> list[GroupSamples]:
            return await asyncio.gather(*(self.engine.generate(task) for task in tasks))

        return self.run(both())

    def score(self, *tasks: ScoreTask) -> list[TokenScores]:
        async def all_of() -> list[TokenScores]:
            return await asyncio.gather(*(self.engine.score(task) for task in tasks))

        return self.run(all_of())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    engine = create(spec_of(save_tiny(folder / "model", seed=0)))
    with asyncio.Runner() as runner:
        served = Served(engine, runner, folder)
        served.model = tiny(0)
        try:
            yield served
        finally:
            runner.run(engine.close())


def gap(model: Any, samples: GroupSamples, temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probs and those of a teacher-forced forward
    pass."""
    return float(np.abs(forced_log_probs(model, samples, temperature) - samples.log_probs).max())


# ---- sampling ------------------------------------------------------------------------------------


def test_a_model_that_was_never_updated_is_frozen(served: Served) -> None:
    if served.versions:
        pytest.skip("another test came first and loaded a policy")
    (samples,) = served.sample(make_task(words(5), n=2))
    assert set(versions(samples)) == {-1}
    assert served.engine.policy_version == -1


def test_greedy_tokens_are_those_of_generate(served: Served) -> None:
    tasks = [
        make_task(words(length, start=length), temperature=0.0, max_new_tokens=24)
        for length in (1, 40, 70)
    ]
    for samples in served.sample(*tasks):
        prompt = torch.from_numpy(samples.prompt_ids.astype(np.int64))[None]
        expected = served.model.generate(
            prompt, do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(prompt)
        )
        assert completions(samples) == [expected[0, prompt.shape[1] :].tolist()]
        assert samples.finish_reasons == ["length"]


def test_more_prompt_tokens_than_one_step_takes_are_sampled(served: Served) -> None:
    """vLLM 0.32 dies of a prompt that it reads in parts on a CPU, because it cannot rewind the seed
    of the request."""
    tasks = [make_task(words(900, start=start), n=1, max_new_tokens=3) for start in range(24)]
    for samples in served.sample(*tasks):
        assert len(samples.prompt_ids) >= 900 and gap(served.model, samples) < TOLERANCE


def test_groups_are_complete_and_their_members_differ(served: Served) -> None:
    ended: list[int] = []
    before = served.engine.progress
    task = make_task(words(70), n=8, max_new_tokens=60)
    samples = served.run(served.engine.generate(task, ended.append))
    assert sum(ended) == 8 and len(samples.texts) == 8
    assert len({tuple(tokens) for tokens in completions(samples)}) == 8
    for tokens, reason in zip(completions(samples), samples.finish_reasons, strict=True):
        assert END_ID not in tokens[:-1]
        assert reason == ("stop" if tokens[-1] == END_ID else "length")
    assert "stop" in samples.finish_reasons
    assert served.engine.progress - before == len(samples.token_ids)


def test_log_probs_are_those_of_the_new_policy_right_after_an_update(served: Served) -> None:
    """The prompt fills blocks of the prefix cache: keys of the policy before would show."""
    task = make_task(words(70), n=4, max_new_tokens=40, temperature=0.8)
    served.sample(task)
    served.load(seed=11)
    first, again = (served.sample(task)[0] for _ in range(2))
    for samples in (first, again):
        assert gap(served.model, samples, temperature=0.8) < TOLERANCE
        assert set(versions(samples)) == {served.versions}
    assert gap(tiny(12), first, temperature=0.8) > 0.1


def test_log_probs_are_those_of_the_truncated_distribution(served: Served) -> None:
    cut = {"temperature": 0.7, "top_k": 6, "top_p": 0.8}
    (samples,) = served.sample(make_task(words(9), n=4, max_new_tokens=40, **cut))
    expected = truncated_log_probs(served.model, samples, **cut)
    assert np.abs(expected - samples.log_probs).max() < TOLERANCE
    assert gap(served.model, samples, temperature=0.7) > 0.05


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 6, "temperature": 0.7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_p": 0.99, "min_p": 0.01, "support_limit": 3},
    ],
    ids=["top-k", "top-p", "min-p", "all, at the limit"],
)
def test_supports_are_those_of_the_truncated_distribution(
    served: Served, cut: dict[str, Any]
) -> None:
    """And the trainer's log-probs over them are the engine's."""
    sampling = StudentSampling(max_new_tokens=40, **cut)
    (samples, other) = served.sample(
        task_with_support(words(9), sampling, n=4), make_task(words(4), max_new_tokens=20)
    )
    assert other.support is None
    assert_supports(served.model, samples, sampling.in_training, close=TOLERANCE)
    proximal_T = trainer_log_probs(served.model, samples, sampling.temperature)
    assert np.abs(proximal_T.numpy() - samples.log_probs).max() < TOLERANCE


def test_of_equal_tokens_a_support_has_as_many_as_fit(served: Served) -> None:
    """Half of the vocabulary shares one row of the output head, so that vLLM's top-k, which keeps
    all tokens that are as probable as the last one, leaves far more than k."""
    model = tiny(3)
    model.lm_head.weight[20:] = model.lm_head.weight[20].clone()
    served.take(model)
    sampling = StudentSampling(max_new_tokens=40, top_k=3)
    (samples,) = served.sample(task_with_support(words(9), sampling, n=4))
    served.load(seed=0)
    assert samples.support is not None and samples.support.lengths_T.max() == 3
    rows = np.split(samples.support.ids, samples.support.offsets[1:-1])
    # With an exact top-k the same of the equal tokens would be left everywhere.
    assert len({i for row in rows for i in row.tolist() if i >= 20}) > 3
    proximal_T = trainer_log_probs(model, samples, temperature=1.0)
    assert np.abs(proximal_T.numpy() - samples.log_probs).max() < TOLERANCE


class Flat(NamedTuple):
    """vLLM's flat log-probs, two positions of the sampled token and its three most probable."""

    token_ids: list[int]
    logprobs: list[float]


def test_ties_that_do_not_fit_the_limit_are_left_out_but_never_the_sampled_token() -> None:
    """Of four equal tokens vLLM's top-k keeps all, whatever k is."""
    quarter, none = float(np.log(0.25)), -np.inf
    flat = Flat([9, 2, 5, 7, 5, 5, 2, 7], [quarter] * 4 + [0.0, 0.0, none, none])
    log_probs, rows = read_support(flat, 2, limit=3)
    assert [sorted(row.tolist()) for row in rows] == [[2, 5, 9], [5]]
    assert log_probs.tolist() == pytest.approx([np.log(1 / 3), 0.0])


def test_prompts_that_cannot_be_sampled_are_refused(served: Served) -> None:
    with pytest.raises(EngineError, match="leaves no room in a context of 1024") as caught:
        served.sample(make_task(words(CONTEXT)))
    assert not caught.value.retryable
    (samples,) = served.sample(make_task(words(CONTEXT - 3), temperature=0.0))
    assert len(samples.token_ids) == 3


def test_settings_that_cannot_work_are_user_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(
        UserError,
        match=r"max_num_seq: vLLM has no such engine argument \(did you mean 'max_num_seqs'",
    ):
        create(spec_of(folder, max_num_seq=4))
    with pytest.raises(
        UserError,
        match="kv_cache_memory_bytes is 1000; expected at least 540672, the keys and values",
    ):
        create(spec_of(folder, kv_cache_memory_bytes=1000))
    with pytest.raises(UserError, match=r"actors\.rollout\.engine_args: vLLM refuses them: "):
        create(spec_of(folder, max_num_seqs=-3))
    narrow = save(make_model("llama"), tmp_path / "narrow")
    with pytest.raises(
        UserError, match=r"has attention heads of width 8; on a CPU vLLM serves 32, 64"
    ):
        create(spec_of(narrow))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError) as caught:
        create(msgspec.structs.replace(spec_of(folder), device="cuda:0"))
    assert str(caught.value) == (
        "actors.rollout.devices names 'cuda:0', but the vLLM that is installed runs on cpu; "
        "expected 'cpu' there, or the vLLM of '.[vllm]' (docs/vllm.md)"
    )


# ---- updates in flight ---------------------------------------------------------------------------


def update_in_flight(served: Served, seeds: tuple[int, int]) -> tuple[GroupSamples, np.ndarray]:
    """Load the second policy while a group is being sampled; returns the samples and which tokens
    are of the first."""
    served.load(seeds[0])
    engine, manifest = served.engine, served.publish(tiny(seeds[1]))

    async def work() -> GroupSamples:
        start = engine.progress
        sampling = asyncio.ensure_future(
            engine.generate(make_task(words(70), 2, temperature=0.0, max_new_tokens=600))
        )
        while engine.progress < start + 40:
            await asyncio.sleep(0)
        await engine.load_policy(manifest)
        return await sampling

    samples = served.run(work())
    assert samples.offsets.tolist() == [0, 600, 1200]
    assert samples.version_spans[:, 1].tolist() == [manifest.version - 1, manifest.version] * 2
    assert samples.version_spans[:, 0].min() >= 15
    served.model = tiny(seeds[1])
    return samples, np.array(versions(samples)) < manifest.version


def differences(samples: GroupSamples, seed: int) -> np.ndarray:
    """Of every token's log-prob from that of the tiny model of `seed` [T]."""
    return np.abs(forced_log_probs(tiny(seed), samples) - samples.log_probs)


def test_an_update_in_flight_gives_both_versions_in_one_completion(served: Served) -> None:
    samples, old = update_in_flight(served, (21, 22))
    assert differences(samples, 21)[old].max() < TOLERANCE
    # Keys and values of the old policy were kept, which a forward pass of the new one does not
    # have.
    assert differences(samples, 22)[~old].max() > TOLERANCE


def test_recompute_makes_the_new_policy_read_all_tokens_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine, "_kv_policy", "recompute")
    samples, old = update_in_flight(served, (31, 32))
    assert differences(samples, 31)[old].max() < TOLERANCE
    assert differences(samples, 32)[~old].max() < TOLERANCE


# ---- bad publications ----------------------------------------------------------------------------


def truncate(manifest: PolicyManifest) -> PolicyManifest:
    os.truncate(manifest.path, 64)
    return manifest


def flip(manifest: PolicyManifest) -> PolicyManifest:
    """Change one byte of the last tensor."""
    with open(manifest.path, "r+b") as file:
        file.seek(manifest.tensors[-1].start)
        byte = file.read(1)[0]
        file.seek(manifest.tensors[-1].start)
        file.write(bytes([byte ^ 1]))
    return manifest


def vanish(manifest: PolicyManifest) -> PolicyManifest:
    os.unlink(manifest.path)
    return manifest


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "the file has 64 bytes"), (flip, "has digest"), (vanish, "No such file")],
    ids=["torn", "flipped", "vanished"],
)
def test_a_damaged_publication_leaves_the_old_weights_serving(
    served: Served, damage: Callable[[PolicyManifest], PolicyManifest], reason: str
) -> None:
    check_refused(served, lambda: damage(served.publish(tiny(99))), reason)


def test_a_publication_of_another_model_leaves_the_old_weights_serving(served: Served) -> None:
    other = make_model(
        "llama", hidden_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=32
    )
    check_refused(served, lambda: served.publish(other), "has shape")


def test_a_file_that_is_replaced_after_it_was_verified_is_not_loaded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zppo_actors.engines.vllm import engine as module

    verify = module.verify

    def verify_then_replace(layout: Any, manifest: PolicyManifest) -> Any:
        update = verify(layout, manifest)
        shared_memory.publish(tiny(98).state_dict(), manifest.version, served.folder)
        return update

    def publish() -> PolicyManifest:
        monkeypatch.setattr(module, "verify", verify_then_replace)
        return served.publish(tiny(99))

    check_refused(served, publish, "the file was replaced or changed")


def check_refused(served: Served, publish: Callable[[], PolicyManifest], reason: str) -> None:
    served.load(seed=51)
    version, manifest = served.engine.policy_version, publish()
    with pytest.raises(PublicationRefused, match=reason):
        served.run(served.engine.load_policy(manifest))
    assert served.engine.policy_version == version and served.engine.broken is None
    (samples,) = served.sample(make_task(words(40), n=2))
    assert gap(served.model, samples) < TOLERANCE
    assert set(versions(samples)) == {version}


# ---- scores of given tokens -----------------------------------------------------------------------


def test_scores_are_the_best_of_a_plain_forward_pass(served: Served) -> None:
    tasks = [
        to_score([3, 0, 9, 1]),
        to_score([1], prompt=1, top_k=1, seed=1),
        to_score([0, 0], seed=2),
        to_score([20] * 6, prompt=90, top_k=VOCABULARY + 9, seed=3),
        to_score([7], prompt=CONTEXT - 7, seed=4),
    ]
    before = served.engine.progress
    for task, found in zip(tasks, served.score(*tasks, *tasks)[: len(tasks)], strict=True):
        if len(task.token_ids):
            assert_scores(
                found, forward(served.model, task), min(task.top_k, VOCABULARY), TOLERANCE
            )
        else:
            assert found.token_ids.shape == (0, 6)
    assert served.engine.progress - before >= 2 * (13 + 1 + 120 + 7)


def test_what_vllm_cannot_score_is_refused_for_good(served: Served) -> None:
    long = to_score([8], prompt=CONTEXT - 7)
    for task, sentence in (
        (
            to_score([2], temperature=0.5),
            "vLLM scores at temperature 1 only, not at 0.5; the engine 'transformers' does",
        ),
        (
            long,
            (
                f"prompt and response have {CONTEXT + 1} tokens together, more than the context of "
                f"{CONTEXT}"
            ),
        ),
    ):
        with pytest.raises(EngineError, match=sentence) as error:
            served.score(task)
        assert not error.value.retryable
    assert len(served.score(to_score([2]))[0].token_ids) == 2


def test_a_response_with_a_given_start_is_whole(served: Served) -> None:
    task = make_task(words(4), n=2, max_new_tokens=5)
    prompt = msgspec.structs.replace(
        task.prompt, start=ResponseStart(text="w5 w6 w7 w8 w9", share=0.4)
    )
    started = msgspec.structs.replace(task, prompt=prompt)
    samples = served.run(served.engine.generate(started))
    assert samples.prompt_ids[-2:].tolist() == [5, 6] and len(samples.prompt_ids) == 6
    assert all(text.startswith("w5 w6 ") for text in samples.texts)


# ---- agreement with the trainer ------------------------------------------------------------------


def trainer_gap(folder: Path, samples: GroupSamples, step: int) -> tuple[float, float]:
    """`mismatch_kl` and `log_prob_gap_max` of a training step of the model in `folder` on these
    samples."""
    from zppo.training.state import build_trainer
    from zppo.training.step import train_step

    topology = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model=str(folder), dtype="float32"),
        method=MethodConfig(updates_per_step=1),
    )
    rewards = np.arange(len(samples.texts), dtype=np.float32) % 2
    group = TrainGroup(
        group_id="g", question_id="q", kind="plain", samples=samples, rewards=rewards
    )
    metrics = train_step(
        build_trainer(topology, lambda: 0.0), TrainWindow(step=step, groups=[group])
    )
    return metrics["mismatch_kl"], metrics["log_prob_gap_max"]


def test_trainer_and_engine_agree_and_a_skipped_update_shows(
    served: Served, tmp_path: Path
) -> None:
    served.load(seed=41)
    (samples,) = served.sample(make_task(words(40), n=4, max_new_tokens=40))
    kl, largest = trainer_gap(save_tiny(tmp_path / "same", seed=41), samples, served.versions)
    assert abs(kl) < TOLERANCE and largest < TOLERANCE
    kl, largest = trainer_gap(save_tiny(tmp_path / "next", seed=42), samples, served.versions)
    assert kl > 0.01 and largest > 0.1


# ---- the actor -----------------------------------------------------------------------------------


def test_an_actor_serves_and_leaves_when_its_engine_dies_in_a_load(served: Served) -> None:
    """The last of all: nothing can be asked of the engine afterwards."""
    topology = Topology(data=DataConfig(train="unused"), student=StudentConfig(model="unused"))
    context = ActorContext(Path(), served.folder, "rollout-0", "rollout", 0, topology, "run", 0)
    core, worker = engine_processes(os.getpid())

    async def work() -> None:
        line = Line()
        actor = asyncio.create_task(EngineActor(context, served.engine, line, "rollout").run())

        async def answer(message: AnyMessage, wanted: type[Answer]) -> Answer:
            line.incoming.put_nowait(message)
            while not line.all(wanted) and not actor.done():
                await asyncio.sleep(0.01)
            return line.all(wanted)[0]

        line.incoming.put_nowait(Welcome(heartbeat_seconds=0.1))
        loaded = await answer(LoadPolicy(manifest=served.publish(tiny(1))), PolicyLoaded)
        assert loaded.version == served.versions
        torn = LoadPolicy(manifest=truncate(served.publish(tiny(2))))
        assert "the file has 64 bytes" in (await answer(torn, PolicyRefused)).reason
        samples = (await answer(make_task(words(40), n=4, task_id="a"), GenerateResult)).samples
        assert set(versions(samples)) == {loaded.version}
        assert gap(tiny(1), samples) < TOLERANCE
        assert line.sent.index(line.all(Credits)[0]) > line.sent.index(loaded)

        worker.send_signal(signal.SIGSTOP)  # a load cannot end now
        line.incoming.put_nowait(LoadPolicy(manifest=served.publish(tiny(3))))
        core.kill()
        assert await actor == 1
        assert "the engine core of vLLM has died" in line.all(Goodbye)[0].reason

    served.run(work())
    _, alive = psutil.wait_procs([core, worker], timeout=CALL_SECONDS)
    assert not alive


def engine_processes(actor: int) -> tuple[psutil.Process, psutil.Process]:
    """The engine core of an actor, and the worker under it."""
    processes = psutil.Process(actor).children(recursive=True)
    (core,), (worker,) = titled(processes, "EngineCore"), titled(processes, "Worker")
    return core, worker
