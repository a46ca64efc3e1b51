"""What a sink is, ours or one that a user brings: an object with these four methods.

They are called one after the other on a thread that is the sink's alone. An exception of any of
them ends the sink and not the run; one that does not come back holds up nothing but what waits for
this sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct


class RunInfo(Struct, frozen=True, kw_only=True):
    """The run that a sink is opened for.

    `id` is the same over all attempts and resumes, so a tracker finds its run again by it. `folder`
    is the sink's own in the run directory. `settings`: the resolved topology as plain values.
    `start`: the step that this attempt begins with.
    """

    id: str
    name: str
    directory: Path
    folder: Path
    settings: dict[str, Any]
    start: int


class Event(Struct, frozen=True, kw_only=True):
    """A line of the journal: who, a short snake_case word, and a sentence."""

    actor: str
    event: str
    detail: str


class Sink(Protocol):
    """`once`, True where it is missing: a step that was handed over is not handed over again,
    whatever becomes of the run; what an earlier attempt could not hand over comes before the first
    new step. False: a resumed run hands over again from its checkpoint on, and `open` has to remove
    what is there of later steps."""

    def open(self, run: RunInfo) -> None:
        """Called once, before everything else."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a trained step under their names in `metrics.jsonl`, and their aliases.
        The result of an evaluation comes as a call of its own, with `heldout/accuracy` alone."""
        ...

    def event(self, event: Event) -> None:
        """What happened, as in the journal."""
        ...

    def close(self) -> None:
        """The run has ended, or the sink has failed."""
        ...
