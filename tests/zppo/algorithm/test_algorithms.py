"""Every method against the naive transcriptions of the paper's algorithms, group by group, without
staleness."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
from random_worlds import random_topology, random_world
from reference import METHODS, Run, Step
from worlds import World, mark

from zppo.algorithm.methods import method_names
from zppo.algorithm.window import TEACHER, Window
from zppo.data.corpus import shuffled
from zppo.scheduling.events import Trained
from zppo.scheduling.waiting import waiting
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TrainGroup

BATCHES, WORLDS = 26, 80
"""Batches of scripted worlds: two for each method, 2,080 worlds together."""


def naive_run(world: World) -> Run:
    config, corpus = world.topology, world.corpus
    method, scheduler = config.method, config.scheduler
    return Run(
        order=[corpus[i].id for i in shuffled(len(corpus), config.run.seed, 0)],
        rewards=world.rewards,
        responses=world.responses,
        new=scheduler.new_questions,
        rho_replay=scheduler.rho_replay,
        rho_aug=scheduler.rho_aug,
        rho_aug_max=scheduler.rho_aug_max,
        tau=method.hard_threshold,
        capacity=scheduler.buffer_capacity,
        g_s=method.group_size,
        g_t=method.teacher_group_size,
        teachers=1 + len(config.more_teachers),
        cascade=method.teacher_order == "cascade",
        dynamic=method.dynamic_sampling,
        merge=method.merge_candidates,
    )


def members(window: Window, group: TrainGroup) -> dict[tuple[str, int], float]:
    """{(group that sampled it, index): reward}, told by the tokens that the trainer gets."""
    sampled = [g.id for v in window.visits for g in (*v.student_groups(), *v.teacher_groups())]
    names = {mark(name): name for name in sampled}
    tokens, offsets = group.samples.token_ids.tolist(), group.samples.offsets.tolist()
    rollouts = [tokens[start:end] for start, end in itertools.pairwise(offsets)]
    return {(names[a], b): r for (a, b), r in zip(rollouts, group.rewards.tolist(), strict=True)}


def oracle(window: Window, trained: dict[str, dict[tuple[str, int], float]]) -> dict[str, Any]:
    """What chance decided in a window."""
    return {
        "replayed": [v.question.id for v in window.visits if v.origin == "replay"],
        "first_teacher": {
            v.question.id: v.teacher_groups()[0].teacher
            for v in window.visits
            if v.teacher_groups()
        },
        "candidates": {
            (v.question.id, r.kind): [(c.source, c.index, c.count) for c in r.candidates]
            for v in window.visits
            for r in v.reformulations
        },
        "members": {name: list(group) for name, group in trained.items()},
    }


def check_step(world: World, run: Run, done: Trained, sent: TrainWindow) -> Step:
    """One step of the scheduler is one step of the naive transcription."""
    window = done.window
    trained = {group.group_id: members(window, group) for group in sent.groups}
    assert len(trained) == len(sent.groups), "a group is trained twice"
    step = METHODS[world.method.name](run, window.index, oracle(window, trained))
    assert [v.question.id for v in window.visits] == step.x
    assert [v.question.id for v in window.visits if v.origin == "new"] == step.x_new
    draws = re.compile(rf"{window.index}/[^/]+/{TEACHER}(-\d+)?")
    assert sorted(filter(draws.fullmatch, world.dispatched)) == sorted(step.asked)
    assert {(v.question.id, r.kind) for v in window.visits for r in v.reformulations} == set(
        step.instances
    )
    assert trained == step.trained
    buffer = world.scheduler.buffer.entries()
    assert [e.question.id for e in buffer] == run.buffer
    assert all(e.entry_accuracy == run.entry_accuracy[e.question.id] for e in buffer)
    return step


def check_groups(sent: TrainWindow) -> None:
    """Behind the prompt that the student read, and named for the kind of the rollouts."""
    for group in sent.groups:
        index, question, kind = group.group_id.split("/")
        prompt = "plain" if kind.startswith(TEACHER) else kind
        assert group.samples.prompt_ids.tolist() == [1, mark(f"{index}/{question}/{prompt}")]
        assert (group.question_id, group.kind) == (question, kind.split("-")[0])
        assert group.samples.texts == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_without_staleness_every_method_is_its_algorithm(batch: int) -> None:
    name = method_names()[batch % len(METHODS)]
    steps = []
    for seed in range(batch * WORLDS, (batch + 1) * WORLDS):
        rng = random.Random(seed)
        world = random_world(
            rng, random_topology(rng, name, max_staleness=0), most_questions=14, seed=seed
        )
        run = naive_run(world)
        turns = itertools.count()
        while not world.scheduler.finished:
            assert next(turns) < 100_000, waiting(world.scheduler)
            done = len(world.steps)
            world.turn()
            for trained, sent in zip(world.steps[done:], world.sent[done:], strict=True):
                steps.append(check_step(world, run, trained, sent))
                check_groups(sent)
    assert any(step.trained for step in steps) and any(step.hard for step in steps), (
        "the worlds show nothing"
    )


def test_every_method_has_its_naive_transcription() -> None:
    assert sorted(METHODS) == method_names()
