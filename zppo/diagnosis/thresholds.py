"""Where health ends: every number that a rule compares with, in one place.

They are set so that the runs of `examples/` pass without a severe finding, and so wide of them that
noise does not decide: a severe advisory may end a run (`run.on_advice: stop`).
"""

from __future__ import annotations

from msgspec import Struct


class Thresholds(Struct, frozen=True, kw_only=True):
    steps: int = 5
    """Steps in a row that a state must last which should not occur at all."""
    long_steps: int = 10
    """Steps over which a noisy share is averaged."""
    fewest: int = 20
    """Groups or questions without which no share of them is judged."""
    most: float = 0.9
    """Share of responses cut off, or without an answer, that is severe."""
    many: float = 0.5
    """The same, as a warning."""
    grading_timeouts: float = 0.01
    """Share of responses whose grading was cut off, as a warning."""
    most_grading_timeouts: float = 0.2
    """The same, severe."""
    rewards_failed: float = 0.01
    """Share of responses whose reward could not be had, as a warning."""
    most_rewards_failed: float = 0.5
    """The same, severe."""
    live_rollouts: float = 0.05
    """Share of rollouts with an advantage, below which hardly anything is learnt."""
    able: float = 0.05
    """Plain accuracy of the first steps that is no chance, in windows of a few dozen rollouts."""
    accuracy_left: float = 0.1
    """Share of it that must be left before questions are called too hard."""
    signal: float = 0.1
    """Share of mixed groups below which a kind of prompt has stopped teaching."""
    habit: float = 0.8
    """|2p - 1| of the share p of picks of the first slot: .9 or .1 and beyond is a habit."""
    judgement: float = 0.2
    """How much more often the first slot must be picked when it holds the right candidate."""
    entropy_gone: float = 1e-3
    """Nats a token at which the policy samples nothing but one answer."""
    entropy_low: float = 1e-2
    """The same, as a warning."""
    entropy_left: float = 0.1
    """Share of the first entropy that must be left before low is called fallen."""
    mismatch: float = 0.05
    """Nats a token between engine and trainer, as a warning if it has doubled."""
    much_mismatch: float = 0.5
    """The same, severe however it came about."""
    idle: float = 0.8
    """Share of its time that a part of the machine may do nothing."""
    busy: float = 0.9
    """Share of its time that the grader has work when it holds up the others."""


LIMITS = Thresholds()
