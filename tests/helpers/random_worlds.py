"""Settings drawn at random for scripted worlds, of any method and with all of the options."""

from __future__ import annotations

import random
from typing import Any, TypeVar

from worlds import World, questions, topology

from zppo.algorithm.methods import get_method
from zppo.config.topology import Batches, Topology

AnyWorld = TypeVar("AnyWorld", bound=World)


def random_topology(
    rng: random.Random,
    method: str,
    max_staleness: int,
    batches: Batches = "windows",
    **run: Any,
) -> Topology:
    """A lawful topology of the method with few questions in a window; keyword arguments go to the
    section `run`."""
    scoring = rng.choice(["colocated", "remote"])
    return topology(
        method=_method(rng, method),
        scheduler={**_scheduler(rng, max_staleness), "batches": batches},
        run={"seed": rng.randint(0, 99), **run},
        teacher={"compression": rng.choice(["teacher", "rule"]), "scoring": scoring},
        more_teachers=[]
        if get_method(method).needs_scores
        else [{"model": "another"}] * rng.choice([0, 0, 1, 2]),
        student={"sampling": {"top_p": rng.choice([0.9, 1.0])}},
    )


def _method(rng: random.Random, method: str) -> dict[str, Any]:
    trivial_matter = get_method(method).needs_scores
    return {
        "name": method,
        "group_size": rng.choice([2, 4, 8]),
        "teacher_group_size": rng.choice([1, 2, 4]),
        "hard_threshold": rng.choice([0.3, 0.5, 0.75]),
        "teacher_order": rng.choice(["cascade", "pool"]),
        "dynamic_sampling": not trivial_matter and rng.random() < 0.3,
        "merge_candidates": rng.random() < 0.3,
    }


def _scheduler(rng: random.Random, max_staleness: int) -> dict[str, Any]:
    rho_aug = rng.choice([0.0, 0.25, 0.5, 1.0])
    return {
        "max_staleness": max_staleness,
        "new_questions": rng.randint(1, 6),
        "rho_replay": rng.choice([0.0, 0.25, 0.5, 1.0]),
        "rho_aug": rho_aug,
        "rho_aug_max": rng.choice([None, None, max(rho_aug, 0.5), 1.0]),
        "buffer_capacity": rng.randint(1, 6),
        "max_attempts": 1000,
        "lease_seconds": 50.0,
    }


def random_rates(rng: random.Random, crash: float) -> dict[str, float]:
    """How often things go wrong in a `random_world`."""
    return {
        "crash_rate": crash,
        "failure_rate": rng.choice([0.0, 0.1]),
        "hang_rate": rng.choice([0.0, 0.02]),
    }


def random_world(
    rng: random.Random,
    config: Topology,
    most_questions: int,
    seed: int,
    kind: type[AnyWorld] = World,
    **rates: float,
) -> AnyWorld:
    """A world of 1 to `most_questions` questions; where the method allows it, some teachers give
    text alone. In some worlds part of the gradings comes to no end."""
    method = get_method(config.method.name)
    scores_remotely = config.teacher is not None and config.teacher.scoring == "remote"
    text_only = (
        not method.teacher_tokens
        and not (method.needs_scores and scores_remotely)
        and rng.random() < 0.3
    )
    corpus = questions(rng.randint(1, most_questions))
    heldout = questions(rng.choice([0, 3]), "h") if rates else []
    return kind(
        config,
        corpus,
        seed=seed,
        heldout=heldout,
        text_only_teachers=text_only,
        undecided_rate=rng.choice([0.0, 0.0, 0.3, 0.8]),
        **rates,
    )
