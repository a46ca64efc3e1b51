"""A deliberately naive transcription of Algorithm 1: plain lists and dicts, no windows in flight, nothing shared with
the scheduler. Randomness is an oracle: the replayed questions and the drawn candidates are told to it, it checks that
they are lawful and goes on with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Rewards = Callable[[str, int], list[float]]
"""(group id, size) -> rewards."""


class Naive:
    def __init__(
        self,
        *,
        order: list[str],
        rewards: Rewards,
        new: int,
        rho_replay: float,
        rho_aug: float,
        tau: float,
        capacity: int,
        g_s: int,
        g_t: int,
        replay: bool,
        teacher: bool,
        kinds: list[str],
    ) -> None:
        self.order, self.rewards = order, rewards
        self.new, self.rho_replay, self.rho_aug, self.tau, self.capacity = new, rho_replay, rho_aug, tau, capacity
        self.g_s, self.g_t, self.replay, self.teacher, self.kinds = g_s, g_t, replay, teacher, kinds
        self.buffer: list[str] = []
        self.entry_accuracy: dict[str, float] = {}

    def step(self, t: int, oracle: dict[str, Any]) -> dict[str, Any]:
        """One rollout step. `oracle` has `replayed` (ids) and `candidates` ({(id, kind): [(source, index)]})."""
        x_new = self.order[t * self.new : (t + 1) * self.new]
        x_replay = oracle["replayed"]
        wanted = math.floor(self.rho_replay * len(x_new) + 1e-9) if self.replay else 0
        assert len(x_replay) == len(set(x_replay)) == min(wanted, len(self.buffer))
        assert set(x_replay) <= set(self.buffer)
        x = x_new + x_replay

        plain = {q: self.rewards(f"{t}/{q}/plain", self.g_s) for q in x}
        r_bar = {q: sum(plain[q]) / self.g_s for q in x}

        taught = {}
        for q in x:
            if r_bar[q] < self.tau and self.teacher:
                taught[q] = self.rewards(f"{t}/{q}/teacher", self.g_t)

        cap = math.floor(self.rho_aug * len(x_new) + 1e-9)
        admits = {}
        for q in x:
            admits[q] = []
            if r_bar[q] < self.tau:
                wrong = any(r < 1 for r in plain[q])
                if "bcq" in self.kinds and wrong and any(r >= 1 for r in taught.get(q, [])):
                    admits[q].append("bcq")
                if "ncq" in self.kinds and wrong:
                    admits[q].append("ncq")
        kept = []
        for q in sorted((q for q in x if admits[q]), key=lambda q: (r_bar[q], x.index(q))):
            if len(kept) < cap:
                kept.append(q)

        instances: list[tuple[str, str]] = []
        full = False
        for q in kept:
            for kind in admits[q]:
                if not full and len(instances) < cap:
                    instances.append((q, kind))
                else:
                    full = True
        for q, kind in instances:
            self.check_candidates(oracle["candidates"][q, kind], kind, plain[q], taught.get(q, []))
        groups = {f"{t}/{q}/plain" for q in x} | {f"{t}/{q}/{kind}" for q, kind in instances}

        if self.replay:
            self.refresh(x, r_bar)
        return {"x_new": x_new, "x_replay": x_replay, "taught": set(taught), "instances": instances, "groups": groups}

    def check_candidates(
        self, drawn: list[tuple[str, int]], kind: str, plain: list[float], taught: list[float]
    ) -> None:
        wrong = {("student", i) for i, r in enumerate(plain) if r < 1}
        right = {("teacher", i) for i, r in enumerate(taught) if r >= 1}
        if kind == "bcq":
            assert len(drawn) == 2
            assert len(set(drawn) & wrong) == 1 and len(set(drawn) & right) == 1
        else:
            assert len(drawn) == len(wrong) and set(drawn) == wrong

    def refresh(self, x: list[str], r_bar: dict[str, float]) -> None:
        for q in x:
            if r_bar[q] < self.tau and q not in self.buffer:
                self.buffer.append(q)
                self.entry_accuracy[q] = r_bar[q]
            elif r_bar[q] >= self.tau and q in self.buffer:
                self.buffer.remove(q)
        while len(self.buffer) > self.capacity:
            self.buffer.pop(0)
