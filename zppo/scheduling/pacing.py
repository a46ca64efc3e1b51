"""When a window may be dispatched: the staleness inequality, and a lead that adapts below it.

The inequality: a sample may be trained on at step t only if t − min(version of its tokens) ≤
max_staleness. One version is published per step and step t trains the policy of version t, so it
holds if window w is dispatched only when

    w ≤ h + max_staleness        with the horizon h = steps trained and published,

and only to engines whose loaded version is ≥ w − max_staleness. Queue time counts, because h grows
only with training. `zppo.training.batch` checks every token again when the window is trained.

The *lead* (0 ≤ lead ≤ max_staleness) is how far ahead windows really are dispatched. Each shipped
window moves it by one at most:

- up, when the trainer has been idle for more than `IDLE_SHARE` of its time over about the last
  `MEMORY` steps. One slow window makes those behind it lie about; that is no calm, because the
  trainer's wait for it is still remembered;
- down, when the trainer was not, and each of the last lead + `PATIENCE` windows waited for the
  trainer: so many are shipped before a change of the lead shows.

So a starving trainer is given the bound, and where the trainer is the bottleneck staleness stays
below it.
"""

from __future__ import annotations

from msgspec import Struct

MEMORY = 8
"""Steps over which the trainer's idleness is averaged (exponentially)."""
IDLE_SHARE = 0.05
"""The lead grows while the trainer is idle for a larger share of its time."""
PATIENCE = 3
"""Windows, on top of the lead, that must have waited for the trainer before the lead shrinks."""


class PacerState(Struct, kw_only=True):
    """`waited` and `trained` are seconds of the trainer, the last steps counting most; `calm`
    counts the windows in a row that waited for it."""

    lead: int
    calm: int = 0
    waited: float = 0.0
    trained: float = 0.0

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
        """Learn from one shipped window: how long the trainer waited for it, how long it waited for
        the trainer, and how long the step before took (0: this process has trained none yet)."""
        if not step_seconds:
            return  # no lead would have spared the trainer its wait for the first window
        state, keep = self.state, 1.0 - 1.0 / MEMORY
        state.waited = keep * state.waited + trainer_waited
        state.trained = keep * state.trained + step_seconds
        state.calm = state.calm + 1 if window_waited > trainer_waited else 0
        if state.waited > IDLE_SHARE * (state.waited + state.trained):
            state.lead, state.calm = min(self.lead + 1, self.max_staleness), 0
        elif state.calm >= self.lead + PATIENCE and self.lead > 1:
            state.lead, state.calm = self.lead - 1, 0
