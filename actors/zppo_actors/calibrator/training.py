"""Training steps of expected size on random tokens, for their time alone. The weights are spoilt
and thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from zppo.algorithm.methods import get_method
from zppo.config.rewards import parts_of
from zppo.config.topology import Topology
from zppo.simulation import Accuracies
from zppo.training.step import train_step
from zppo.training.trainer import Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup

SMALLEST = 1 / 16
"""Part of a window that is trained first; it doubles while the time is enough."""
LIKELY = -1.0
"""Log-prob of a random token, which the trainer corrects as it does any other."""


class Windows:
    """Random windows: groups as long and as often right as was measured."""

    def __init__(
        self,
        topology: Topology,
        lengths: Sequence[int],
        prompt_tokens: int,
        accuracies: Accuracies,
        vocabulary: int,
    ) -> None:
        self._topology, self._law = topology, accuracies
        self._lengths, self._prompt_tokens = np.asarray(lengths), prompt_tokens
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(0)

    def window(self, step: int, groups: int) -> TrainWindow:
        return TrainWindow(step=step, groups=[self._group(step, i) for i in range(groups)])

    def _group(self, step: int, number: int) -> TrainGroup:
        size, rng = self._topology.method.group_size, self._rng
        lengths = rng.choice(self._lengths, size)
        total = int(lengths.sum())
        rewards = (rng.random(size) < self._skill()).astype(np.float32)
        parts = len(parts_of(self._topology.data.reward))
        return TrainGroup(
            group_id=f"{step}/{number}/plain",
            question_id=f"{number}",
            kind="plain",
            samples=GroupSamples(
                prompt_ids=self._ids(self._prompt_tokens),
                token_ids=self._ids(total),
                log_probs=np.full(total, LIKELY, np.float32),
                offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                version_spans=np.array([[total, step]], np.int32),
                texts=[],
                finish_reasons=["stop"] * size,
            ),
            rewards=rewards,
            scores=self._scores(total),
            reward_parts=np.repeat(rewards[:, None], parts, axis=1) if parts else None,
        )

    def _ids(self, count: int) -> np.ndarray:
        return self._rng.integers(0, self._vocabulary, count).astype(np.int32)

    def _skill(self) -> float:
        law = self._law
        return law.values[0] if law.values else float(self._rng.beta(law.alpha, law.beta))

    def _scores(self, total: int) -> TokenScores | None:
        """Of a remote teacher, where the loss is a distance from it."""
        teacher = self._topology.teacher
        scored = get_method(self._topology.method.name).needs_scores
        if teacher is None or teacher.scoring != "remote" or not scored:
            return None
        ids = np.tile(np.arange(teacher.score_top_k, dtype=np.int32), (total, 1))
        log_prob = -np.log(2.0 * teacher.score_top_k)
        return TokenScores(token_ids=ids, log_probs=np.full(ids.shape, log_prob, np.float32))


def trained(
    trainer: Trainer, windows: Windows, groups: int, seconds: float
) -> tuple[list[int], list[float]]:
    """(tokens, seconds) of steps of growing size, the first two of equal size; the first one, in
    which everything is new, is left out."""
    end, tokens, times = time.perf_counter() + seconds, list[int](), list[float]()
    count, step = max(1, round(SMALLEST * groups)), 0
    while True:
        window = windows.window(step, count)
        begin = time.perf_counter()
        train_step(trainer, window)
        took = time.perf_counter() - begin
        if step:
            tokens.append(
                sum(g.samples.written_tokens + g.samples.read_tokens for g in window.groups)
            )
            times.append(took)
            larger = min(2 * count, groups)
            if time.perf_counter() + took * larger / count > end or len(times) >= 8:
                return tokens, times
            count = larger
        step += 1
