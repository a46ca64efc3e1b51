"""The simulated engine: a continuous-batching machine whose sequences share its token steps.

All running sequences advance one token per step of `curve.seconds(running)`, so an engine needs an
event only where a sequence ends (processor sharing). `place` counts its token steps; a sequence
that starts at place p and has L tokens ends at p + prompt + L, whatever else runs.

Shape legend: T response tokens of a group laid end to end, N completions of a group, S spans.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right

import numpy as np
from msgspec import Struct

from zppo.scheduling.dispatch import Job
from zppo.simulation.world import Engines
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import FROZEN

ROUNDING = 1e-6
"""Token steps; sequences that end so close together end at once."""


class Held(Struct):
    """A job that an engine works on."""

    job: Job
    lengths: list[int]
    cut_off: int
    """a response of so many tokens was cut off"""
    start: float
    """where the first token of its sequences is sampled"""
    left: int


class Engine:
    """One engine. Times never go back; `advance` comes before anything else that happens."""

    def __init__(self, name: str, pool: str, speeds: Engines, now: float) -> None:
        self.name, self.pool, self.speeds = name, pool, speeds
        self.version, self.loading = FROZEN, False
        self.epoch = 0
        """Changes whenever what `next_end` said no longer holds."""
        self.returned = 0
        """Sequences that have ended and whose credits were not given back."""
        self.slot_seconds = 0.0
        self._running: list[tuple[float, int, Held]] = []
        self._started = 0
        self._place, self._now, self._stands_until = 0.0, now, now
        self._seconds = [speeds.curve.seconds(n) for n in range(speeds.slots + 1)]
        self._loads: tuple[list[float], list[int]] = [0.0], [FROZEN]

    def advance(self, now: float) -> None:
        """Let the running sequences go on to `now`."""
        running = len(self._running)
        if running:
            self.slot_seconds += running * (now - self._now)
            moving = now - max(self._now, self._stands_until)
            if moving > 0.0:
                self._place += moving / self._seconds[running]
        self._now = now

    def next_end(self) -> float | None:
        """When the next sequence ends, if nothing else happens."""
        if not self._running:
            return None
        steps = max(0.0, self._running[0][0] - self._place)
        begin = max(self._now, self._stands_until)
        return begin + steps * self._seconds[len(self._running)]

    def start(self, job: Job, lengths: list[int], cut_off: int) -> None:
        """Take a job; all its sequences begin now."""
        self.epoch += 1
        start = self._place + self.speeds.prompt_steps
        held = Held(job, lengths, cut_off, start, len(lengths))
        for length in lengths:
            self._started += 1
            heapq.heappush(self._running, (start + length, self._started, held))

    def ended(self) -> list[Held]:
        """The jobs whose last sequence has ended by now."""
        self.epoch += 1
        done = []
        while self._running and self._running[0][0] <= self._place + ROUNDING:
            _, _, held = heapq.heappop(self._running)
            self.returned += 1
            held.left -= 1
            if not held.left:
                done.append(held)
        return done

    def stand(self, until: float) -> None:
        """The running sequences stand still, because weights are loaded."""
        self.epoch += 1
        self.loading, self._stands_until = True, until

    def loaded(self, version: int) -> None:
        """From here on tokens are of this version."""
        self.loading, self.version = False, version
        self._loads[0].append(self._place)
        self._loads[1].append(version)

    def samples(self, held: Held, prompt_tokens: int) -> GroupSamples:
        """What a finished job has written: lengths and versions are real, tokens are not."""
        total = sum(held.lengths)
        offsets = np.zeros(len(held.lengths) + 1, np.int32)
        np.cumsum(held.lengths, out=offsets[1:])
        spans = [span for length in held.lengths for span in self._spans(held.start, length)]
        return GroupSamples(
            prompt_ids=_nothing(prompt_tokens, np.int32),
            token_ids=_nothing(total, np.int32),
            log_probs=_nothing(total, np.float32),
            offsets=offsets,
            version_spans=np.array(spans, np.int32),
            texts=[f"response {index}" for index in range(len(held.lengths))],
            finish_reasons=[
                "length" if length >= held.cut_off else "stop" for length in held.lengths
            ],
        )

    def _spans(self, start: float, length: int) -> list[tuple[int, int]]:
        """(tokens, version) of a sequence: a token is of the version that was loaded when its step
        began."""
        places, versions = self._loads
        first = bisect_right(places, start + ROUNDING) - 1
        spans, done = [], 0
        for index in range(first, len(places)):
            end = length
            if index + 1 < len(places):
                end = min(length, max(done, round(places[index + 1] - start)))
            if end > done:
                spans.append((end - done, versions[index]))
            done = end
        return spans


_ARRAYS: dict[type, np.ndarray] = {}


def _nothing(size: int, dtype: type) -> np.ndarray:
    """`size` zeros, all in the same memory: a simulated run holds millions of tokens."""
    known = _ARRAYS.get(dtype)
    if known is None or len(known) < size:
        known = _ARRAYS[dtype] = np.zeros(max(size, 1 << 17), dtype)
        known.flags.writeable = False
    return known[:size]
