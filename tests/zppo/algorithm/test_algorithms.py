"""Every method against the naive transcriptions of the paper's algorithms, group by group, without
staleness."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from naive_windows import members, naive_run, oracle
from random_worlds import random_topology, random_world
from reference import METHODS, Run, Step
from worlds import World, mark

from zppo.algorithm.methods import method_names
from zppo.algorithm.window import TEACHER
from zppo.scheduling.events import Trained
from zppo.scheduling.waiting import waiting
from zppo_protocol.messages import TrainWindow

BATCHES, WORLDS = 26, 80
"""Batches of scripted worlds: two for each method, 2,080 worlds together."""


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
