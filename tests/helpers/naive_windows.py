"""A scripted world as the naive transcriptions see it: its settings, and what chance decided in a
window."""

from __future__ import annotations

import itertools
from typing import Any

from reference import Run
from worlds import World, mark

from zppo.algorithm.window import Window
from zppo.data.corpus import shuffled
from zppo_protocol.samples import TrainGroup


def naive_run(world: World) -> Run:
    config, corpus = world.topology, world.corpus
    method, scheduler = config.method, config.scheduler
    return Run(
        order=[corpus[i].id for i in shuffled(len(corpus), config.run.seed, 0)],
        rewards=world.rewards,
        responses=world.responses,
        undecided=world.undecided,
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
