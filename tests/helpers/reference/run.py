"""What all naive transcriptions share: X of a step, the plain rollouts, the cap and the buffer.

Plain lists and dicts, no windows in flight, nothing shared with the scheduler. Randomness is an
oracle: what chance drew is told, checked to be lawful, and taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Rewards = Callable[[str, int], list[float]]
"""(group id, size) -> rewards."""
Responses = Callable[[str, int], list[tuple[str, str]]]
"""(group id, size) -> (text, parsed answer) of each."""
Undecided = Callable[[str, int], bool]
"""(group id, index) -> whether the grading of this response came to no end."""
Oracle = dict[str, Any]
"""What chance drew: `replayed` ids · `first_teacher` {id: number} · `candidates` {(id, kind):
[(source, index, count)]} · `members` {id of a trained group: [(group, index)]}."""
Trained = dict[str, dict[tuple[str, int], float]]
"""Group id -> {(group that sampled it, index): reward}."""


@dataclass
class Run:
    """The settings of one run and what it carries from step to step."""

    order: list[str]
    rewards: Rewards
    responses: Responses
    undecided: Undecided
    new: int
    rho_replay: float
    rho_aug: float
    rho_aug_max: float | None
    tau: float
    capacity: int
    g_s: int
    g_t: int
    teachers: int
    cascade: bool
    dynamic: bool
    merge: bool
    buffer: list[str] = field(default_factory=list)
    entry_accuracy: dict[str, float] = field(default_factory=dict)


@dataclass
class Step:
    """One rollout step: X, the rewards of its plain rollouts, and what the transcription finds
    out."""

    t: int
    x_new: list[str]
    x_replay: list[str]
    plain: dict[str, list[float]]
    r_bar: dict[str, float]
    hard: list[str]
    asked: list[str] = field(default_factory=list)
    instances: list[tuple[str, str]] = field(default_factory=list)
    trained: Trained = field(default_factory=dict)

    @property
    def x(self) -> list[str]:
        return self.x_new + self.x_replay


def begin(run: Run, t: int, oracle: Oracle, replay: bool) -> Step:
    """Draw X = X_new ∪ X_replay, answer every question G_S times, and see which are hard."""
    x_new = run.order[t * run.new : (t + 1) * run.new]
    x_replay = oracle["replayed"]
    wanted = floor(run.rho_replay * len(x_new)) if replay else 0
    assert len(x_replay) == len(set(x_replay)) == min(wanted, len(run.buffer)), (
        "as many as ρ_replay says"
    )
    assert set(x_replay) <= set(run.buffer), "replayed questions come from the buffer"
    x = x_new + x_replay
    plain = {q: run.rewards(f"{t}/{q}/plain", run.g_s) for q in x}
    r_bar = {q: sum(plain[q]) / run.g_s for q in x}
    hard = [q for q in x if r_bar[q] < run.tau]
    return Step(t=t, x_new=x_new, x_replay=x_replay, plain=plain, r_bar=r_bar, hard=hard)


def floor(value: float) -> int:
    """⌊value⌋, where 0.3 · 10 is 3."""
    return math.floor(value + 1e-9)


def cap(run: Run, step: Step) -> int:
    """How many questions are rewritten at most: ρ_aug·|X_new|, or, our option, as many as are hard,
    up to a limit."""
    fixed = floor(run.rho_aug * len(step.x_new))
    if run.rho_aug_max is None:
        return fixed
    return max(fixed, min(len(step.hard), floor(run.rho_aug_max * len(step.x_new))))


def hardest_first(step: Step, questions: list[str]) -> list[str]:
    """Ascending r̄; where two are equal, the one that stands first in X."""
    return sorted(questions, key=lambda q: (step.r_bar[q], step.x.index(q)))


def ask_teacher(
    run: Run, step: Step, oracle: Oracle, questions: list[str]
) -> dict[str, tuple[str, list[float]]]:
    """G_T fresh teacher responses to each of these questions: their group and rewards.

    Our options with several teachers: a cascade goes on to the next one while none of the answers
    is correct, a pool asks any one of them.
    """
    taught = {}
    for q in questions:
        first = oracle["first_teacher"][q]
        assert 0 <= first < run.teachers and not (run.cascade and first != 0)
        for number in range(first, run.teachers):
            name = f"{step.t}/{q}/teacher" + (f"-{number + 1}" if number > 0 else "")
            step.asked.append(name)
            taught[q] = (name, run.rewards(name, run.g_t))
            if not run.cascade or any(r >= 1 for r in taught[q][1]):
                break
    return taught


def train(step: Step, question: str, kind: str, rewards: list[float]) -> None:
    """A group of which every rollout is trained on."""
    name = f"{step.t}/{question}/{kind}"
    step.trained[name] = {(name, i): reward for i, reward in enumerate(rewards)}


def drop_trivial(run: Run, step: Step) -> None:
    """Our dynamic sampling: a question all of whose trained groups came back all-same is left out
    of the loss."""
    if not run.dynamic:
        return
    for q in step.x:
        names = [name for name in step.trained if name.split("/")[1] == q]
        if all(len(set(step.trained[name].values())) == 1 for name in names):
            for name in names:
                del step.trained[name]


def refresh(run: Run, step: Step) -> None:
    """Admit what is hard, graduate what is not, evict the oldest. Plain rollouts alone decide."""
    for q in step.x:
        if q in step.hard and q not in run.buffer:
            run.buffer.append(q)
            run.entry_accuracy[q] = step.r_bar[q]
        elif q not in step.hard and q in run.buffer:
            run.buffer.remove(q)
    while len(run.buffer) > run.capacity:
        run.buffer.pop(0)
