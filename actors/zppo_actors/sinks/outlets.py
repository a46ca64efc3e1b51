"""All sinks of a run, and what the controller has to say of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from zppo import extensions
from zppo.config.sinks import OwnSink, SinksConfig
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.sinks import check_methods, own_name
from zppo.records.aliases import with_aliases
from zppo_actors.sinks.base import Event, RunInfo, Sink
from zppo_actors.sinks.outlet import Call, Evaluation, Outlet, Step
from zppo_actors.sinks.prometheus import PrometheusSink
from zppo_actors.sinks.tensorboard import TensorBoardSink
from zppo_actors.sinks.trackers import MlflowSink, TrackioSink, WandbSink

FOLDER = "sinks"
"""In the run directory; every sink has a folder of its own there."""
BUILT_IN: dict[str, Callable[..., Sink]] = {
    "wandb": WandbSink,
    "trackio": TrackioSink,
    "mlflow": MlflowSink,
    "prometheus": PrometheusSink,
}
"""Sinks with a section of their own in `sinks`, which they are made with."""


class _Choice(NamedTuple):
    name: str
    make: Callable[[], Sink]
    identity: str = ""


class Outlets:
    """The sinks of one attempt, which begins with step `start`. `lines` and `heldout` are the
    records of all steps and evaluations so far."""

    def __init__(
        self,
        topology: Topology,
        run_dir: Path,
        start: int,
        lines: Sequence[Mapping[str, Any]] = (),
        heldout: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._aliases = topology.sinks.aliases
        # A controller that says nothing for a lease counts as one that hangs.
        self._seconds = min(topology.sinks.close_seconds, topology.scheduler.lease_seconds / 2)
        self._told: set[tuple[str, str]] = set()
        info = RunInfo(
            id="",
            name=topology.run.name,
            directory=run_dir,
            folder=run_dir / FOLDER,
            settings=msgspec.to_builtins(topology),
            start=start,
        )
        self._outlets = [
            Outlet(
                one.name,
                one.make,
                msgspec.structs.replace(info, folder=info.folder / one.name),
                partial(self._missed, lines, heldout),
                one.identity,
            )
            for one in _chosen(topology.sinks)
        ]

    @property
    def failed(self) -> int:
        """Sinks that have failed."""
        return sum(outlet.problem is not None for outlet in self._outlets)

    @property
    def dropped(self) -> int:
        """Calls that were dropped because a sink had too many."""
        return sum(outlet.dropped for outlet in self._outlets)

    def step(self, line: Mapping[str, Any]) -> None:
        """A trained step, as its line of `metrics.jsonl`."""
        self._put(self._step(line))

    def evaluated(self, step: int, accuracy: float) -> None:
        """A held-out evaluation."""
        self._put(_evaluation({"step": step, "accuracy": accuracy}))

    def event(self, event: Event) -> None:
        self._put(event)

    def news(self) -> Iterator[tuple[str, str]]:
        """(event, detail) of what has gone wrong, each once."""
        for outlet in self._outlets:
            for event, detail in _trouble(outlet):
                if (outlet.name, event) not in self._told:
                    self._told.add((outlet.name, event))
                    yield event, f"sinks.{outlet.name}: {detail}"

    def close(self) -> Iterator[tuple[str, str]]:
        """Let all sinks take what waits and close, for `sinks.close_seconds` together; then (event,
        detail) of those that have not."""
        for outlet in self._outlets:
            outlet.end()
        deadline = time.monotonic() + self._seconds
        for outlet in self._outlets:
            left = outlet.wait(max(0.0, deadline - time.monotonic()))
            if left:
                yield (
                    "sink_left",
                    f"sinks.{outlet.name}: it did not close in {self._seconds:g} s "
                    f"(sinks.close_seconds) and had {left} to take; metrics.jsonl has all steps",
                )
        yield from self.news()

    def _missed(
        self, lines: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]
    ) -> Iterator[Call]:
        yield from map(self._step, lines)
        yield from map(_evaluation, heldout)

    def _put(self, call: Call) -> None:
        for outlet in self._outlets:
            outlet.put(call)

    def _step(self, line: Mapping[str, Any]) -> Step:
        values = with_aliases(line, self._aliases)
        return Step(line["step"], {n: v for n, v in values.items() if n != "step"})


def _evaluation(line: Mapping[str, Any]) -> Evaluation:
    return Evaluation(line["step"], {"heldout/accuracy": line["accuracy"]})


def _trouble(outlet: Outlet) -> Iterator[tuple[str, str]]:
    if outlet.problem is not None:
        yield "sink_failed", f"{outlet.problem}; the run goes on without it"
    if outlet.dropped:
        yield "sink_slow", "it is slow or away, and what does not fit into its queue is dropped"
    if outlet.renewed:
        yield "sink_changed", "its code is not what it was before the run was resumed"


# ---- which -------------------------------------------------------------------------------------


def _chosen(config: SinksConfig) -> Iterator[_Choice]:
    if config.tensorboard:
        yield _Choice("tensorboard", TensorBoardSink)
    for name, make in BUILT_IN.items():
        section = getattr(config, name)
        if section is not None:
            yield _Choice(name, partial(make, section))
    for number, own in enumerate(config.use):
        yield _own(f"sinks.use[{number}].use", own)


def _own(setting: str, own: OwnSink) -> _Choice:
    """A user's sink. What cannot be imported any more fails on its own thread, like the rest."""
    try:
        identity = extensions.identity_of(setting, own.use, "sink")
    except UserError:
        identity = ""

    def make() -> Sink:
        sink: Sink = extensions.load(setting, own.use, "sink").value(**own.args)
        check_methods(setting, own.use, sink)
        return sink

    return _Choice(own_name(own.use), make, identity)
