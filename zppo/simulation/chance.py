"""What chance decides in a simulated run: how often a question is answered, how long a response is,
what it earns. Everything follows from the seed and the task, so that order of arrival cannot
matter and two schedules see the same answers."""

from __future__ import annotations

import math
import random

from zppo.algorithm.window import TEACHER
from zppo.simulation.world import Lengths, World

Z_99 = 2.3263478740408408
"""The standard normal's 99th percentile."""
ALMOST_ONE = math.nextafter(1.0, 0.0)


class Chance:
    def __init__(self, world: World, seed: int) -> None:
        self._world, self._seed = world, seed
        laws = {"": world.lengths, **world.lengths_of}
        self._values = {kind: sorted(law.values) for kind, law in laws.items()}
        self._questions: dict[str, tuple[float, float]] = {}

    def skill(self, question: str) -> float:
        """The chance that the student answers a question."""
        return self._question(question)[0]

    def lengths(self, task_id: str, kind: str, n: int, limit: int) -> list[int]:
        """Lengths of the n responses of a task; one of `limit` tokens was cut off."""
        law = self._world.lengths_of.get(kind)
        law, kind = (self._world.lengths, "") if law is None else (law, kind)
        limit = min(limit, law.cap)
        rng = random.Random(f"{self._seed}/{task_id}/lengths")
        question = task_id.split("/")[1]
        if values := self._values[kind]:
            shared = math.sqrt(law.of_question) * self._question(question)[1]
            own = math.sqrt(1.0 - law.of_question)
            chosen = (_share_below(shared + own * rng.gauss(0.0, 1.0)) for _ in range(n))
            return [min(limit, values[int(share * len(values))]) for share in chosen]
        middle, spread = self._lognormal(law, question)
        return [
            min(limit, max(1, round(math.exp(middle + spread * rng.gauss(0.0, 1.0)))))
            for _ in range(n)
        ]

    def rewards(self, group_id: str, n: int) -> list[float]:
        """1 for each correct response of a group, else 0."""
        _, question, kind = group_id.split("/")
        chance, law = self.skill(question), self._world.accuracies
        if kind.startswith(TEACHER):
            chance = law.teacher
        elif kind not in ("plain", "evaluate"):
            chance += law.reformulated * (1.0 - chance)
        rng = random.Random(f"{self._seed}/{group_id}/rewards")
        return [float(rng.random() < chance) for _ in range(n)]

    def _lognormal(self, law: Lengths, question: str) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of the lengths at one question."""
        skill, of_question = self._question(question)
        sigma = math.log(law.p99_ratio) / Z_99
        middle = math.log(law.median) + math.log(law.hard_ratio) * (0.5 - skill)
        middle += sigma * math.sqrt(law.of_question) * of_question
        return middle, sigma * math.sqrt(1.0 - law.of_question)

    def _question(self, question: str) -> tuple[float, float]:
        """A question's accuracy, and how far its lengths lie from the median (standard normal)."""
        if question not in self._questions:
            law = self._world.accuracies
            rng = random.Random(f"{self._seed}/{question}")
            skill = rng.choice(law.values) if law.values else rng.betavariate(law.alpha, law.beta)
            self._questions[question] = skill, rng.gauss(0.0, 1.0)
        return self._questions[question]


def _share_below(z: float) -> float:
    """The normal distribution's share below z, in [0, 1)."""
    return min(0.5 * math.erfc(-z / math.sqrt(2.0)), ALMOST_ONE)
