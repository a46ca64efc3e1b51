"""A second transcription of the paper's algorithms, deliberately naive. `step` is one rollout step
of a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from reference.algorithm1 import algorithm1
from reference.distillation import algorithm2, algorithm3
from reference.guided import algorithm5or6, teacher_response
from reference.run import Oracle, Run, Step

__all__ = ["METHODS", "Oracle", "Run", "Step"]

METHODS: dict[str, Callable[[Run, int, Oracle], Step]] = {
    "grpo": partial(algorithm1, replay=False, kinds=[], teacher=False),
    "grpo_replay": partial(algorithm1, replay=True, kinds=[], teacher=False),
    "grpo_both": partial(algorithm1, replay=False, kinds=["bcq", "ncq"], teacher=True),
    "grpo_replay_bcq": partial(algorithm1, replay=True, kinds=["bcq"], teacher=True),
    "grpo_replay_ncq": partial(algorithm1, replay=True, kinds=["ncq"], teacher=False),
    "zppo": partial(algorithm1, replay=True, kinds=["bcq", "ncq"], teacher=True),
    "grpo_replay_teacher_response": teacher_response,
    "hint": partial(algorithm5or6, kind="hint"),
    "prefix": partial(algorithm5or6, kind="prefix"),
    "off_distill": partial(algorithm2, replay=False),
    "off_distill_replay": partial(algorithm2, replay=True),
    "on_distill": partial(algorithm3, replay=False),
    "on_distill_replay": partial(algorithm3, replay=True),
}
"""Method name -> its naive step."""
