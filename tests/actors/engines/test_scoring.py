"""Engines that score given tokens: against independent forward passes, beside sampling, and in what
they refuse.

Shape legend: T response tokens, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from actor_helpers import Line, Moody, start_actor
from engine_helpers import VOCABULARY, completions, make_model, make_task, save, words
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_helpers import assert_scores, forward, to_score
from training_cases import CPU, SETTINGS, gemma2_with_soft_cap, method, trainer_of
from transformers_helpers import build, run, sample

from zppo.plan.engines.openai import OpenAIArguments
from zppo.plan.memory import SCORED_ROWS, SCORED_TOKENS
from zppo.training.batch import assemble
from zppo.training.distillation import Divergence
from zppo.training.step import split
from zppo.training.trainer import Counts
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_actors.engines.score_tasks import NO_TOKEN, ScoreTable, check_scorable
from zppo_actors.engines.simulated import Script, SimulatedEngine
from zppo_actors.engines.transformers import scoring
from zppo_actors.engines.transformers.scoring import Scorer, passes
from zppo_protocol.messages import (
    Credits,
    Heartbeat,
    ScoreResult,
    ScoreTask,
    Shutdown,
    TaskFailed,
    TrainWindow,
)
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup


async def score(engine: Any, *tasks: ScoreTask) -> list[TokenScores]:
    return await asyncio.gather(*(engine.score(task) for task in tasks))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(), tmp_path_factory.mktemp("model"))


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("pass_tokens", [1, 40, 8192])
def test_scores_are_the_best_of_a_plain_forward_pass(
    folder: Path, temperature: float, pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PASS_TOKENS", pass_tokens)
    monkeypatch.setattr(scoring, "CHUNK_ROWS", 7)
    tasks = [
        to_score([3, 0, 9, 1, 0], temperature=temperature),
        to_score([1], prompt=1, top_k=1, temperature=temperature, seed=1),
        to_score([0, 0], temperature=temperature, seed=2),
        to_score([20] * 6, top_k=VOCABULARY + 9, temperature=temperature, seed=3),
    ]
    engine = build(folder)
    for task, found in zip(tasks, run(engine, score(engine, *tasks)), strict=True):
        if len(task.token_ids):
            assert_scores(found, forward(make_model(), task), min(task.top_k, VOCABULARY))
        else:
            assert found.token_ids.shape == (0, 6)
    assert engine.progress == 13 + 1 + 120


@pytest.mark.slow
@pytest.mark.parametrize("own_logits", [False, True])
def test_a_soft_capped_model_scores_through_its_head_or_its_own_logits(
    own_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gemma2_with_soft_cap().eval()
    vocabulary = model.config.vocab_size
    if own_logits:
        monkeypatch.setattr(scoring, "probe_head", lambda *_: None)
        monkeypatch.setattr(scoring, "PASS_LOGITS", vocabulary * 20)
    monkeypatch.setattr(scoring, "CHUNK_ROWS", 7)
    scorer = Scorer(model, "teacher.model")
    assert scorer.pass_tokens == (20 if own_logits else scoring.PASS_TOKENS)
    task = msgspec.structs.replace(
        to_score([3, 12, 5], seed=4), token_ids=np.arange(20, dtype=np.int32)
    )
    task = msgspec.structs.replace(task, prompt_ids=task.prompt_ids % vocabulary, temperature=0.5)
    table = ScoreTable(task, scorer.vocabulary)
    for members in passes(task, scorer.pass_tokens):
        scorer.read(task, members, table)
    assert_scores(table.scores(), forward(model, task), 6)


@pytest.mark.slow
def test_sampling_and_scoring_do_not_disturb_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PASS_TOKENS", 30)
    sampled = [
        make_task(words(4 + i), n=3, seed=i, max_new_tokens=40, temperature=0.9) for i in range(3)
    ]
    scored = [to_score([6, 7, 8, 9], seed=i, name=f"s{i}") for i in range(3)]

    async def both(engine: Any) -> tuple[list[GroupSamples], list[TokenScores]]:
        return await asyncio.gather(sample(engine, *sampled), score(engine, *scored))

    together, alone = build(folder), build(folder)
    found, scores = run(together, both(together))
    expected = run(alone, sample(alone, *sampled))
    for one, other in zip(found, expected, strict=True):
        assert completions(one) == completions(other)
    for task, score_ in zip(scored, scores, strict=True):
        assert_scores(score_, forward(make_model(), task), 6)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), max_tokens=st.integers(1, 60))
def test_passes_hold_every_response_that_has_tokens_once(
    lengths: list[int], max_tokens: int
) -> None:
    task = to_score(lengths)
    batches = passes(task, max_tokens)
    assert sorted(index for batch in batches for index in batch) == [
        i for i, length in enumerate(lengths) if length
    ]
    for batch in batches:
        width = len(task.prompt_ids) + max(lengths[index] for index in batch) - 1
        assert len(batch) == 1 or len(batch) * width <= max_tokens


def test_the_memory_estimate_counts_with_the_same_numbers() -> None:
    assert (scoring.PASS_TOKENS, scoring.CHUNK_ROWS) == (SCORED_TOKENS, SCORED_ROWS)


def test_what_cannot_be_scored_is_refused_for_good(folder: Path) -> None:
    engine = build(folder, max_length=20)
    long = to_score([3, 16])
    known = to_score([2])
    token_ids = known.token_ids.copy()
    token_ids[1] = VOCABULARY
    foreign = msgspec.structs.replace(known, token_ids=token_ids)

    async def refusals() -> list[Any]:
        return await asyncio.gather(
            engine.score(long), engine.score(foreign), return_exceptions=True
        )

    errors = run(engine, refusals())
    assert [str(error) for error in errors] == [
        "prompt and response have 21 tokens together, more than the context of 20",
        f"the tokens to score hold token id {VOCABULARY}, but the model has {VOCABULARY} tokens",
    ]
    assert not any(error.retryable for error in errors)
    check_scorable(to_score([3, 15]), VOCABULARY, 20)


def faulty(engine: Any, fault: Exception, times: int) -> None:
    """Let the next `times` scoring passes of the engine fail."""
    engine._scorer = scorer = Scorer(engine._model, "teacher.model")
    read, faults = scorer.read, [fault] * times

    def fail(*arguments: Any) -> None:
        if faults:
            raise faults.pop()
        read(*arguments)

    scorer.read = fail  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_pass_that_fails_gives_back_its_own_task_alone(folder: Path) -> None:
    engine = build(folder)
    faulty(engine, torch.OutOfMemoryError("no memory"), 1)
    first, second = to_score([4], name="first"), to_score([5], seed=1, name="second")

    async def both() -> list[Any]:
        return await asyncio.gather(
            engine.generate(make_task(words(4), max_new_tokens=30)),
            engine.score(first),
            engine.score(second),
            return_exceptions=True,
        )

    samples, error, scores = run(engine, both())
    assert isinstance(samples, GroupSamples) and isinstance(error, EngineError)
    assert error.retryable and str(error).startswith("out of memory")
    assert_scores(scores, forward(make_model(), second), 6)
    assert engine.broken is None


@pytest.mark.slow
def test_three_failures_in_a_row_are_beyond_help_but_odd_numbers_are_not(folder: Path) -> None:
    engine, odd = build(folder), build(folder)
    faulty(engine, RuntimeError("device lost"), 3)
    faulty(
        odd,
        EngineError("the model gives probabilities that are not finite numbers", retryable=True),
        3,
    )

    async def all_of(engine: Any) -> list[Any]:
        return await asyncio.gather(
            *(engine.score(to_score([2])) for _ in range(3)), return_exceptions=True
        )

    errors, odd_errors = run(engine, all_of(engine)), run(odd, all_of(odd))
    assert (
        str(errors[-1])
        == engine.broken
        == "the engine failed 3 times in a row; the last time: RuntimeError: device lost"
    )
    assert odd.broken is None and len({str(error) for error in odd_errors}) == 1


@pytest.mark.slow
def test_a_cancelled_task_leaves_and_closing_fails_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PASS_TOKENS", 1)
    engine = build(folder)

    async def play() -> list[Any]:
        unwanted = asyncio.create_task(engine.score(to_score([30] * 200)))
        await asyncio.sleep(0)
        unwanted.cancel()
        [scores] = await score(engine, to_score([2, 3], seed=5))
        waiting = asyncio.create_task(engine.score(to_score([30] * 400)))
        await asyncio.sleep(0)
        await engine.close()
        return [scores, *await asyncio.gather(unwanted, waiting, return_exceptions=True)]

    scores, unwanted, waiting = asyncio.run(asyncio.wait_for(play(), 600.0))
    assert_scores(scores, forward(make_model(), to_score([2, 3], seed=5)), 6)
    assert isinstance(unwanted, asyncio.CancelledError)
    assert str(waiting) == "the engine was closed" and engine.progress < 30 * 400


def test_rows_without_mass_hold_no_token_and_nan_is_refused() -> None:
    table = ScoreTable(to_score([2], top_k=2), VOCABULARY)
    table.put(
        0, np.array([[5, 6], [7, 8]]), np.array([[0.0004, -np.inf], [-1.0, -2.0]], np.float32)
    )
    scores = table.scores()
    assert scores.token_ids.tolist() == [[5, NO_TOKEN], [7, 8]] and scores.log_probs.tolist() == [
        [0, 0],
        [-1, -2],
    ]
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineError, match="probabilities that are not finite numbers"):
            table.put(
                0, np.array([[5, 6], [7, 8]]), np.array([[-1.0, bad], [-1.0, -2.0]], np.float32)
            )


# ---- the trainer's view --------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_of_the_whole_vocabulary_are_a_colocated_teacher(
    folder: Path, tmp_path: Path
) -> None:
    """From the engine through the message into the loss: the same number and the same gradient."""
    teacher, task = make_model(), to_score([3, 0, 7, 5], top_k=VOCABULARY, temperature=0.8)
    engine = build(folder)
    [scores] = run(engine, score(engine, task))
    remote, colocated = (_jsd(task, scores, None), _jsd(task, None, teacher))
    assert remote[0] == pytest.approx(colocated[0], rel=1e-4)
    for name, gradient in remote[1].items():
        scale = float(colocated[1][name].abs().max())
        assert float((gradient - colocated[1][name]).abs().max()) <= 1e-4 * scale + 1e-8, name


def _jsd(task: ScoreTask, scores: TokenScores | None, teacher: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of one distillation step of another model on the responses of the task."""
    student = copy.deepcopy(make_model(seed=3)).requires_grad_(True)
    loss = type(SETTINGS.loss)(**{**vars(SETTINGS.loss), "temperature": task.temperature})
    words_ = method(updates_per_step=1)
    trainer = trainer_of(student, teacher=teacher, objective="jsd", method=words_, loss=loss)
    rollouts = assemble(
        TrainWindow(step=0, groups=[_group(task, scores)]), max_staleness=0, device=CPU
    )
    batches = split(rollouts, trainer.settings)
    objective = Divergence(trainer, rollouts, batches)
    total = 0.0
    parts = trainer.micro_batches(rollouts, objective.live(batches[0]))
    counts = Counts(rollouts.tokens, rollouts.sequences, len(parts))
    for batch in parts:
        part, _ = objective.loss(batch, counts, first=True)
        part.backward()
        total += float(part.detach())
    return total, dict(trainer.gradients.tensors())


def _group(task: ScoreTask, scores: TokenScores | None) -> TrainGroup:
    tokens = len(task.token_ids)
    samples = GroupSamples(
        prompt_ids=task.prompt_ids,
        token_ids=task.token_ids,
        log_probs=np.full(tokens, -1.0, np.float32),
        offsets=task.offsets,
        version_spans=np.array([[tokens, -1]], np.int32),
        texts=[],
        finish_reasons=["stop"] * task.n,
    )
    rewards = np.zeros(task.n, np.float32)
    return TrainGroup(
        group_id="g", question_id="g", kind="plain", samples=samples, rewards=rewards, scores=scores
    )


# ---- other engines -------------------------------------------------------------------------------


def test_the_scripted_engine_likes_every_token_as_it_stands() -> None:
    engine = SimulatedEngine(Script(), 8)
    [whole, two, hot] = asyncio.run(
        score(
            engine,
            to_score([3, 2], top_k=99),
            to_score([3, 2], top_k=2),
            to_score([3, 2], temperature=1e2),
        )
    )
    task = to_score([3, 2])
    assert whole.token_ids[:, 0].tolist() == (
        task.token_ids % 16
    ).tolist() and whole.token_ids.shape == (5, 16)
    assert np.exp(whole.log_probs).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.diff(whole.log_probs) == pytest.approx(-np.log(2), abs=1e-5)
    assert np.array_equal(two.log_probs, whole.log_probs[:, :2]) and engine.progress == 15
    assert hot.log_probs == pytest.approx(-np.log(16), abs=0.1)


def test_a_server_cannot_score_and_says_which_engines_can() -> None:
    engine = OpenAIEngine(OpenAIArguments(base_url="http://127.0.0.1:9/v1"), "m", None)
    with pytest.raises(EngineError) as error:
        run(engine, engine.score(to_score([2])))
    assert str(error.value) == "scoring needs an engine that can score: transformers or vllm"
    assert not error.value.retryable


# ---- the actor -----------------------------------------------------------------------------------


class Scoring(Moody):
    """An engine whose answer to a task to score waits until the test says so."""

    def __init__(self, answer: Callable[[ScoreTask], TokenScores]) -> None:
        super().__init__({})
        self.answer = answer
        self.go = asyncio.Event()

    async def score(self, task: ScoreTask) -> TokenScores:
        await self.go.wait()
        return self.answer(task)


def one_each(task: ScoreTask) -> TokenScores:
    return TokenScores(
        token_ids=task.token_ids[:, None],
        log_probs=np.full((len(task.token_ids), 1), -1.0, np.float32),
    )


def refuse(task: ScoreTask) -> TokenScores:
    raise EngineError("not today", retryable=False)


def stumble(task: ScoreTask) -> TokenScores:
    raise ZeroDivisionError("an engine's own mistake")


async def converse(answer: Callable[[ScoreTask], TokenScores]) -> Line:
    """Send a task of four responses, wait for a heartbeat that lists it, let the engine answer, and
    end."""
    line, engine = Line(), Scoring(answer)
    actor = start_actor(engine, line, [to_score([1, 2, 0, 3])], heartbeat_seconds=0.01)
    async with asyncio.timeout(600):
        while not any(
            beat.tasks == ["s"] and beat.stats["running"] == 4 for beat in line.all(Heartbeat)
        ):
            await asyncio.sleep(0.001)
        engine.go.set()
        while (
            not (line.all(ScoreResult) or line.all(TaskFailed))
            or sum(c.count for c in line.all(Credits)) < 104
        ):
            await asyncio.sleep(0.001)
        line.incoming.put_nowait(Shutdown(reason="done"))
        assert await actor == 0
    return line


def test_a_task_to_score_is_listed_answered_and_its_credits_come_back() -> None:
    line = asyncio.run(converse(one_each))
    [result] = line.all(ScoreResult)
    assert result.task_id == "s" and result.scores.token_ids.shape == (6, 1)
    assert sum(credits.count for credits in line.all(Credits)) == 100 + 4


@pytest.mark.parametrize(
    ("answer", "reason", "retryable"),
    [(refuse, "not today", False), (stumble, "ZeroDivisionError: an engine's own mistake", True)],
)
def test_a_task_that_cannot_be_scored_is_answered_too(
    answer: Callable[[ScoreTask], TokenScores], reason: str, retryable: bool
) -> None:
    line = asyncio.run(converse(answer))
    assert line.all(TaskFailed) == [TaskFailed(task_id="s", reason=reason, retryable=retryable)]
    assert sum(credits.count for credits in line.all(Credits)) == 104 and not line.all(ScoreResult)
