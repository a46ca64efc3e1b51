"""When a window may be dispatched: the staleness inequality, and a lead that adapts below it.

The inequality: a sample may be trained on at step t only if t − min(version of its tokens) ≤
max_staleness. One version is published per step and step t trains the policy of version t, so it
holds if window w is dispatched only when

    w ≤ h + max_staleness        with the horizon h = steps trained and published,

and only to engines whose loaded version is ≥ w − max_staleness. Queue time counts, because h grows
only with training. `zppo.training.batch` checks every token again when the window is trained.

The *lead* (0 ≤ lead ≤ max_staleness) is how far ahead windows really are dispatched. It grows when
the trainer had to wait for a window and shrinks when finished windows lie about, so that typical
staleness stays below the bound.
"""

from __future__ import annotations

from msgspec import Struct

PATIENCE = 3
"""Consecutive windows that must lie about for too long before the lead shrinks."""
IDLE_SHARE = 0.5
"""A window lay about for too long if it waited for more than this share of a step."""


class PacerState(Struct, kw_only=True):
    lead: int
    calm: int = 0

    @classmethod
    def fresh(cls, max_staleness: int) -> PacerState:
        """One window ahead, where the bound allows it."""
        return cls(lead=min(1, max_staleness))


class Pacer:
    def __init__(self, max_staleness: int, state: PacerState) -> None:
        self.max_staleness, self.state = max_staleness, state

    @property
    def lead(self) -> int:
        return min(self.state.lead, self.max_staleness)

    def may_open(self, window: int, horizon: int) -> bool:
        """Whether window `window` may be dispatched now."""
        return window <= horizon + self.lead

    def min_version(self, window: int) -> int:
        """The oldest policy version that may sample a token of this window."""
        return max(0, window - self.max_staleness)

    def shipped(self, trainer_waited: float, window_waited: float, step_seconds: float) -> None:
        """Learn from one shipped window: how long the trainer waited for it, and how long it waited
        for the trainer."""
        if trainer_waited > window_waited:
            self.state.lead = min(self.lead + 1, self.max_staleness)
            self.state.calm = 0
        elif window_waited > IDLE_SHARE * step_seconds:
            self.state.calm += 1
            if self.state.calm >= PATIENCE and self.lead > 1:
                self.state.lead -= 1
                self.state.calm = 0
        else:
            self.state.calm = 0
