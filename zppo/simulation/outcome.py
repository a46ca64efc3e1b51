"""What a simulated run came to, step by step and in all.

Shape legend: T response tokens of a group laid end to end, S version spans.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from msgspec import Struct

from zppo.algorithm.window import PLAIN
from zppo.simulation.chance import Chance
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TrainGroup
from zppo_protocol.values import FROZEN


class Step(Struct, kw_only=True):
    """One trained step. Everything but the first five is of what was trained in it."""

    step: int
    end: float
    """when it was trained and published"""
    seconds: float
    """from the end of the step before"""
    waited: float
    """how long the trainer had nothing to train on before it"""
    lead: int
    """the scheduler's lead when it was shipped"""
    groups: dict[str, int]
    """groups by kind"""
    tokens: int
    """response tokens"""
    prompts: int
    """prompt tokens, once for each group"""
    mean_length: float
    """tokens a response"""
    mean_length_plain: float
    accuracy: float
    """share of correct plain responses"""
    skill: float
    """the same as the questions' chances say, without the chance of the draw"""
    staleness: dict[int, int]
    """tokens by staleness, step minus version; a teacher's are left out"""


class Outcome(Struct, kw_only=True):
    """A simulated run. `warm` of its steps are left out of everything that is told of it in
    all, because it had only begun."""

    steps: list[Step]
    warm: int
    busy: dict[str, float]
    """share of time in use, warm-up left out: of sequence slots, by pool; of the grader and the
    trainer"""
    work: dict[str, float]
    """seconds a step would take if only this pool's work had to be done, always at its best batch;
    of the trainer also its publication"""
    events: int
    """events that the scheduler has handled"""

    @property
    def measured(self) -> list[Step]:
        return self.steps[self.warm :]

    @property
    def seconds_per_step(self) -> float:
        return sum(step.seconds for step in self.measured) / len(self.measured)

    @property
    def work_bound(self) -> float:
        """Seconds a step would take if the busiest machines were always busy."""
        return max(self.work.values())

    @property
    def over_bound(self) -> float:
        """Time over the work bound; 1 is perfect."""
        return self.seconds_per_step / self.work_bound

    @property
    def bottleneck(self) -> str:
        """The pool, or the trainer, whose work takes longest."""
        return max(self.work, key=lambda pool: self.work[pool])

    @property
    def trainer_wait(self) -> float:
        """Share of time in which the trainer had nothing to train on."""
        return sum(s.waited for s in self.measured) / sum(s.seconds for s in self.measured)

    @property
    def tokens_per_step(self) -> float:
        return sum(step.tokens for step in self.measured) / len(self.measured)

    @property
    def staleness_mean(self) -> float:
        """Mean over trained tokens."""
        counts = self._staleness()
        return sum(k * n for k, n in counts.items()) / max(1, counts.total())

    @property
    def staleness_max(self) -> int:
        """Over the whole run."""
        return max(max(step.staleness, default=0) for step in self.steps)

    def _staleness(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for step in self.measured:
            counts.update(step.staleness)
        return counts


def trained_step(
    window: TrainWindow, chance: Chance, *, begin: float, end: float, waited: float, lead: int
) -> Step:
    """What is to be told of a trained window. `begin` is the end of the step before."""
    plain = [group for group in window.groups if group.kind == PLAIN]
    rewards = np.concatenate([group.rewards for group in plain] or [np.zeros(0, np.float32)])
    skills = [chance.skill(group.question_id) for group in plain]
    kinds = Counter(group.kind for group in window.groups)
    tokens, prompts = size_of(window)
    return Step(
        step=window.step,
        end=end,
        seconds=end - begin,
        waited=waited,
        lead=lead,
        groups=dict(kinds),
        tokens=tokens,
        prompts=prompts,
        mean_length=_mean_length(window.groups),
        mean_length_plain=_mean_length(plain),
        accuracy=float((rewards >= 1.0).mean()) if len(rewards) else 0.0,
        skill=sum(skills) / max(1, len(skills)),
        staleness=dict(_staleness(window)),
    )


def size_of(window: TrainWindow) -> tuple[int, int]:
    """(response tokens, prompt tokens once for each group) of a window."""
    responses = sum(len(group.samples.token_ids) for group in window.groups)
    return responses, sum(len(group.samples.prompt_ids) for group in window.groups)


def _mean_length(groups: list[TrainGroup]) -> float:
    responses = sum(len(group.rewards) for group in groups)
    return sum(len(group.samples.token_ids) for group in groups) / max(1, responses)


def _staleness(window: TrainWindow) -> Counter[int]:
    counts: Counter[int] = Counter()
    for group in window.groups:
        for tokens, version in group.samples.version_spans.tolist():
            if version != FROZEN:
                counts[window.step - version] += tokens
    return counts
