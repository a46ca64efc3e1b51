"""Rollouts that a model cannot read, such as a teacher's with token ids of a larger vocabulary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from msgspec import structs
from training_cases import VOCABULARY, group, llama, trainer_of, window

from zppo.training.batch import Reach, assemble
from zppo.training.step import train_step
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup

CPU = torch.device("cpu")
LENGTHS = [3, 4, 2]


def with_token(index: int, token: int) -> TrainGroup:
    """A group of three rollouts, with `token` at place `index` of the nine."""
    plain = group("a", [1, 0, 0], lengths=LENGTHS)
    ids = plain.samples.token_ids.copy()
    ids[index] = token
    samples = structs.replace(
        plain.samples, token_ids=ids, version_spans=np.array([[5, -1], [4, 0]], np.int32)
    )
    return structs.replace(plain, samples=samples)


def emptied(g: TrainGroup, rollout: int) -> TrainGroup:
    """The same group, its rollout written anew without tokens."""
    bounds = [int(end) for end in g.samples.offsets]
    kept = [i for i in range(bounds[-1]) if not bounds[rollout] <= i < bounds[rollout + 1]]
    versions = [*[-1] * 5, *[0] * 4]
    lengths = [0 if i == rollout else length for i, length in enumerate(LENGTHS)]
    samples = GroupSamples(
        prompt_ids=g.samples.prompt_ids,
        token_ids=g.samples.token_ids[kept],
        log_probs=g.samples.log_probs[kept],
        offsets=np.array([0, *itertools.accumulate(lengths)], np.int32),
        version_spans=np.array([[1, versions[i]] for i in kept], np.int32),
        texts=[],
        finish_reasons=g.samples.finish_reasons,
    )
    return structs.replace(g, samples=samples)


@pytest.mark.parametrize(("place", "rollout"), [(0, 0), (4, 1), (6, 1), (8, 2)])
def test_a_rollout_with_an_unknown_token_trains_as_if_it_were_empty(
    place: int, rollout: int
) -> None:
    odd, other = with_token(place, VOCABULARY), group("b", [0, 1], seed=3)
    trained, reference = trainer_of(llama()), trainer_of(llama())
    found = train_step(trained, window(odd, other))
    expected = train_step(reference, window(emptied(odd, rollout), other))
    assert (found.pop("unreadable_rollouts"), expected.pop("unreadable_rollouts")) == (1.0, 0.0)
    assert found == expected
    for name, parameter in trained.policy.parameters().items():
        assert torch.equal(parameter, reference.policy.parameters()[name]), name


def test_the_last_known_token_is_read() -> None:
    metrics = train_step(trainer_of(llama()), window(with_token(0, VOCABULARY - 1)))
    assert metrics["unreadable_rollouts"] == 0.0


def test_longer_than_the_context_cannot_be_read() -> None:
    prompt = len(with_token(0, 1).samples.prompt_ids)
    task = TrainWindow(step=0, groups=[with_token(0, 1)])
    for context, lengths in ((prompt + 4, [3, 4, 2]), (prompt + 3, [3, 0, 2]), (1, [0, 0, 0])):
        rollouts = assemble(task, max_staleness=0, device=CPU, reach=Reach(context=context))
        assert rollouts.lengths_S.tolist() == lengths
        assert rollouts.unreadable == lengths.count(0)


def test_the_shorter_of_two_models_decides() -> None:
    """A colocated teacher reads the student's tokens."""
    small = llama(vocab_size=VOCABULARY - 5, max_position_embeddings=16)
    trainer = trainer_of(llama(), teacher=small, objective="jsd")
    assert trainer.reach == Reach(vocabulary=VOCABULARY - 5, context=16)
    metrics = train_step(trainer, window(with_token(1, VOCABULARY - 5)))
    assert metrics["unreadable_rollouts"] >= 1.0


def test_scores_of_a_remote_teacher_go_with_their_tokens() -> None:
    odd = with_token(4, VOCABULARY)
    scores = TokenScores(
        token_ids=np.arange(9, dtype=np.int32)[:, None],
        log_probs=np.full((9, 1), -0.5, np.float32),
    )
    task = window(structs.replace(odd, scores=scores))
    rollouts = assemble(task, max_staleness=0, device=CPU, reach=Reach(vocabulary=VOCABULARY))
    [left] = [g.scores for g in rollouts.groups]
    assert left is not None and left.token_ids[:, 0].tolist() == [0, 1, 2, 7, 8]
