"""What of a scheduler must not be lost, as one value that msgspec serialises."""

from __future__ import annotations

from msgspec import Struct, field

from zppo.algorithm.replay_buffer import BufferState
from zppo.algorithm.window import Window
from zppo.config.topology import Batches, SchedulerConfig
from zppo.data.cursor import CursorState
from zppo.scheduling.pacing import PacerState


class SchedulerState(Struct, kw_only=True):
    """Everything that must not be lost, at the moment a step was trained. Leases and credits are
    not part of it: after a restore, windows ask again for what they miss.

    `batches` is what the run began with; states that were written before there was a choice have
    none, and went by windows.
    """

    trained: int
    next_window: int
    cursor: CursorState
    buffer: BufferState
    windows: list[Window]
    pacer: PacerState
    evaluated: list[int] = field(default_factory=list)
    batches: Batches = "windows"

    @classmethod
    def fresh(cls, config: SchedulerConfig) -> SchedulerState:
        """That of a run of which nothing is done."""
        return cls(
            trained=0,
            next_window=0,
            cursor=CursorState(),
            buffer=BufferState(entries=[], available=[]),
            windows=[],
            pacer=PacerState.fresh(config.max_staleness),
            batches=batches_of(config, "windows"),
        )


def batches_of(config: SchedulerConfig, begun: Batches) -> Batches:
    """What steps train: windows at bound 0, which is Algorithm 1, else the setting, else what the
    run began with."""
    return "windows" if config.max_staleness == 0 else config.batches or begun
