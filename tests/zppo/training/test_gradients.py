"""Whose tokens have a gradient: the student's, and a teacher's only in the method that says so.
Never a prompt's.

Every RL method plays a scripted world, and its windows are trained on a tiny model while a witness
notes the gradient at the hidden state that predicts each response token.

Shape legend: T response tokens of the window, R of a micro-batch, H hidden size.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import worlds
from torch import Tensor
from training_cases import (
    CPU,
    VOCABULARY,
    group,
    llama,
    longhand_loss,
    method,
    mixed_window,
    trainer_of,
    window,
)

from zppo.algorithm.methods import get_method, method_names
from zppo.training.batch import assemble
from zppo.training.layout import MicroBatch
from zppo.training.step import train_step
from zppo.training.surrogate import step_advantages
from zppo.training.trainer import Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TrainGroup
from zppo_protocol.values import FROZEN

RL_METHODS = [name for name in method_names() if get_method(name).loss == "clipped_surrogate"]


class Witness:
    """Notes, step by step, how large the gradient is at the state that predicts each response
    token, which must be of that token alone."""

    def __init__(self, trainer: Trainer) -> None:
        trainer.policy.shares_prompts = False
        self._hidden = trainer.policy.hidden
        self._seen: list[tuple[Tensor, Tensor]] = []
        trainer.policy.hidden = self.watch  # type: ignore[method-assign]

    def watch(self, batch: MicroBatch) -> Tensor:
        hidden_RH = self._hidden(batch)
        if hidden_RH.requires_grad:
            hidden_RH.retain_grad()
            self._seen.append((batch.tokens_R, hidden_RH))
        return hidden_RH

    def sizes(self, tokens: int) -> np.ndarray:
        """Norms [T] of the last step; 0 for a token that took part in no update."""
        sizes_T = torch.zeros(tokens)
        for tokens_R, hidden_RH in self._seen:
            assert hidden_RH.grad is not None
            assert not sizes_T[tokens_R].any(), "a token was used twice"
            sizes_T[tokens_R] = hidden_RH.grad.norm(dim=-1)
        self._seen.clear()
        return sizes_T.numpy()


# ---- every method in a scripted world ------------------------------------------------------------


def played(name: str) -> tuple[list[TrainWindow], set[int]]:
    """The windows that a method trains in a world of 24 questions, and the marks of the tokens its
    teacher wrote."""
    topology = worlds.topology(
        method={"name": name, "group_size": 4, "teacher_group_size": 4},
        scheduler={"new_questions": 8, "rho_replay": 0.25, "rho_aug": 0.5, "max_staleness": 0},
    )
    world = worlds.World(topology, worlds.questions(24), seed=3).run()
    teachers = {
        worlds.mark(task) for task in world.dispatched if task.split("/")[-1].startswith("teacher")
    }
    return world.sent, teachers


def small_ids(task: TrainWindow) -> TrainWindow:
    """The marks of the world as ids of the tiny model."""

    def small(g: TrainGroup) -> TrainGroup:
        ids = {name: getattr(g.samples, name) % VOCABULARY for name in ("prompt_ids", "token_ids")}
        return msgspec.structs.replace(g, samples=msgspec.structs.replace(g.samples, **ids))

    return window(*map(small, task.groups), step=task.step)


@pytest.mark.slow
@pytest.mark.parametrize("name", RL_METHODS)
def test_a_teacher_is_in_the_gradient_only_where_the_method_says_so(name: str) -> None:
    sent, teacher_marks = played(name)
    trainer = trainer_of(llama(), method=method(updates_per_step=2))
    witness = Witness(trainer)
    by_teacher, by_student = 0, 0
    for task in sent:
        rollouts = assemble(task, max_staleness=0, device=CPU)
        # Each response of the world is its task's mark and a number.
        marks_T = np.repeat(rollouts.host_ids_T[0::2], 2)
        written_T = np.isin(marks_T, list(teacher_marks))
        assert np.array_equal(written_T, rollouts.frozen_T.numpy()), (
            "who wrote a token is not what its version says"
        )
        train_step(trainer, small_ids(task))
        sizes_T = witness.sizes(rollouts.tokens)
        by_teacher += int((sizes_T[written_T] > 0).sum())
        by_student += int((sizes_T[~written_T] > 0).sum())
    assert by_student > 0
    assert (
        (by_teacher > 0)
        == get_method(name).teacher_tokens
        == (name == "grpo_replay_teacher_response")
    )
    assert get_method(name).teacher_draws == "none" or teacher_marks, (
        "the world shows nothing if no teacher wrote"
    )


# ---- a teacher's tokens in the surrogate ---------------------------------------------------------


def with_teacher(task: TrainWindow, log_prob: float) -> tuple[TrainWindow, np.ndarray]:
    """The first rollout of every group written by a teacher, with a made-up log-prob; and which
    tokens it wrote [T]."""
    groups, frozen = [], []
    for g in task.groups:
        first, total = int(g.samples.offsets[1]), len(g.samples.token_ids)
        frozen_T = np.arange(total) < first
        spans = [[first, FROZEN], [total - first, task.step]]
        samples = msgspec.structs.replace(
            g.samples,
            version_spans=np.array([span for span in spans if span[0]], np.int32),
            log_probs=np.where(frozen_T, np.float32(log_prob), g.samples.log_probs),
        )
        groups.append(msgspec.structs.replace(g, samples=samples))
        frozen.append(frozen_T)
    return window(*groups, step=task.step), np.concatenate(frozen)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {
        name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None
    }


WORDS = {
    "truncate": method(updates_per_step=1),
    "mask": method(updates_per_step=1, correction="mask", correction_cap=1.5),
    "none": method(updates_per_step=1, correction="none"),
    "behaviour": method(updates_per_step=1, ratio="behaviour"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_what_a_teacher_says_of_its_own_tokens_does_not_matter(name: str) -> None:
    """Nor does the number of steps since: a frozen model has no age."""
    likely, _ = with_teacher(mixed_window(step=9), -0.01)
    unlikely, frozen_T = with_teacher(mixed_window(step=9), -30.0)
    first, second = (_trainer(name, max_staleness=0) for _ in range(2))
    metrics = train_step(first, likely)
    assert metrics == train_step(second, unlikely)
    assert (metrics["staleness_max"], metrics["updates"]) == (0, 1) and frozen_T.any()
    assert metrics["log_prob_gap_max"] < 20, "the gap to the teacher's log-probs is no mismatch"
    pairs = zip(
        first.policy.parameters().values(), second.policy.parameters().values(), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def _trainer(name: str, **changes: Any) -> Trainer:
    words = WORDS[name]
    loss = trainer_of(llama()).settings.loss
    correction = "none" if words.ratio == "behaviour" else words.correction
    changed = {"correction": correction, "correction_cap": words.correction_cap}
    return trainer_of(
        llama(), method=words, loss=type(loss)(**{**vars(loss), **changed}), **changes
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_a_teachers_tokens_have_the_gradient_of_importance_weight_one(name: str) -> None:
    """As if the student had sampled them just now: their behaviour log-prob is the policy's own."""
    task, frozen_T = with_teacher(mixed_window(), -30.0)
    trainer = _trainer(name)
    rollouts = assemble(task, max_staleness=0, device=CPU)
    advantages_S = step_advantages(rollouts, [np.arange(rollouts.sequences)], WORDS[name])
    # The other way to say it: put the present policy's log-probs where the teacher's were.
    metrics = train_step(observed := _trainer(name), task)
    own_T = _log_probs(trainer, task)
    as_student, start = [], 0
    for g in task.groups:
        rows = slice(start, start := start + len(g.samples.token_ids))
        log_probs = np.where(frozen_T[rows], own_T[rows], g.samples.log_probs).astype(np.float32)
        as_student.append(
            msgspec.structs.replace(
                g, samples=msgspec.structs.replace(g.samples, log_probs=log_probs)
            )
        )
    model = llama()
    loss = longhand_loss(model, window(*as_student), advantages_S, WORDS[name])
    loss.backward()
    norm = float(torch.stack([g.square().sum() for g in gradients_of(model).values()]).sum().sqrt())
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-3, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert observed.optimizer.updates == 1


def _log_probs(trainer: Trainer, task: TrainWindow) -> np.ndarray:
    """What the present policy says of every response token [T]."""
    rollouts = assemble(task, max_staleness=0, device=CPU)
    log_probs_T = torch.zeros(rollouts.tokens)
    for batch in trainer.micro_batches(rollouts, np.arange(rollouts.sequences)):
        found, _ = trainer.policy.log_probs(
            batch, rollouts.token_ids_T[batch.tokens_R], temperature=1.0
        )
        log_probs_T[batch.tokens_R] = found
    return log_probs_T.numpy()


def test_a_window_of_a_teacher_alone_has_no_mismatch_to_measure() -> None:
    task, _ = with_teacher(
        window(group("g", [1.0], lengths=[3]), group("h", [0.0], lengths=[2])), -1.0
    )
    metrics = train_step(trainer_of(llama()), task)
    assert "mismatch_kl" not in metrics and "importance_weight_max" not in metrics
    assert metrics["entropy"] > 0


# ---- prompts and starts --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_prompt_and_the_start_of_a_response_have_no_loss() -> None:
    """The gradient of a step is the longhand one over response tokens; with the end of the prompt
    in it, it is another.

    The end of the prompt is where an engine puts the start that is given to a response.
    """
    given = 2
    task = window(group("g", [1.0, 0.0, 0.0], lengths=[4, 3, 5], seed=5))
    samples = task.groups[0].samples
    assert len(samples.prompt_ids) > given
    words = WORDS["none"]
    metrics = train_step(_trainer("none"), task)
    rollouts = assemble(task, max_staleness=0, device=CPU)
    advantages_S = step_advantages(rollouts, [np.arange(3)], words)

    def norm(of: TrainWindow) -> float:
        model = llama()
        longhand_loss(model, of, advantages_S, words).backward()
        return float(
            torch.stack([g.square().sum() for g in gradients_of(model).values()]).sum().sqrt()
        )

    assert metrics["grad_norm"] == pytest.approx(norm(task), rel=1e-3)
    assert metrics["grad_norm"] != pytest.approx(norm(_start_in_the_loss(task, given)), rel=0.05)
    assert metrics["tokens_trained"] == 12


def _start_in_the_loss(task: TrainWindow, given: int) -> TrainWindow:
    """The same sequences, but with the last `given` tokens of the prompt taken for sampled ones."""
    [g] = task.groups
    samples = g.samples
    parts = np.split(samples.token_ids, samples.offsets[1:-1])
    longer = [np.concatenate([samples.prompt_ids[-given:], part]) for part in parts]
    ends = np.cumsum([0, *map(len, longer)])
    changed = msgspec.structs.replace(
        samples,
        prompt_ids=samples.prompt_ids[:-given],
        token_ids=np.concatenate(longer).astype(np.int32),
        log_probs=np.full(ends[-1], -1.0, np.float32),
        offsets=ends.astype(np.int32),
        version_spans=np.array([[ends[-1], 0]], np.int32),
    )
    return window(msgspec.structs.replace(g, samples=changed))
