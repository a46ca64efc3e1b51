"""What `zppo plan` answers: one value, shown to people by `zppo.capacity.view` and written as JSON
as it is."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from zppo.capacity.search import Candidate, Search
from zppo.capacity.splits import changes, split_of
from zppo.plan.plan import HostNeed, Plan

HOST = "host"


class Process(Struct, frozen=True, kw_only=True):
    """One process of the plan; memory in bytes, the most that it needs, on each of its devices, or
    the least where that is said."""

    name: str
    host: str
    device: str
    engine: str
    threads: int
    host_bytes: int
    device_bytes: int
    host_least: bool
    device_least: bool


class Expected(Struct, frozen=True, kw_only=True):
    """A simulated run. `busy` are shares of time in use, by pool; `work` the seconds that a step
    would take if there were only this pool's work."""

    max_staleness: int
    engines: dict[str, int]
    seconds_per_step: float
    hours: float
    bottleneck: str
    busy: dict[str, float]
    work: dict[str, float]
    trainer_wait: float
    staleness_mean: float
    staleness_max: int
    memory: dict[str, int]
    """bytes by device, and on the host; empty where it was not asked for"""
    memory_least: list[str] = []
    """those of its keys whose bytes are the least that is needed; of the others they are the
    most"""


class Best(Struct, frozen=True, kw_only=True):
    """The fastest that was found, and what to change for it."""

    expected: Expected
    gain: float
    """how many times as many tokens it trains in the same time"""
    changes: list[str]
    """`setting=value`"""


class Replay(Struct, frozen=True, kw_only=True):
    """Seconds of a step in a recorded run, and in its simulation, over the same steps."""

    recorded: float
    simulated: float
    first_step: int
    last_step: int

    @property
    def error(self) -> float:
        return self.simulated / self.recorded - 1.0


class Times(Struct, frozen=True, kw_only=True):
    """What the run would take. `source` is where the speeds are from."""

    source: str
    replay: Replay | None
    given: Expected
    bounds: list[Expected]
    best: Best
    simulations: int
    simulated_steps: int
    ended_early: bool


class Answer(Struct, frozen=True, kw_only=True):
    """The plan, and its times where speeds are known."""

    run: str
    directory: str
    steps: int
    processes: list[Process]
    notes: list[str]
    times: Times | None


def answer_of(plan: Plan, directory: str, times: Times | None) -> Answer:
    return Answer(
        run=plan.topology.run.name,
        directory=directory,
        steps=plan.windows.steps,
        processes=[
            Process(
                name=entry.name,
                host=entry.host,
                device=entry.device,
                engine=entry.served.actor.engine if entry.served is not None else "",
                threads=entry.threads,
                host_bytes=size.host,
                device_bytes=size.device,
                host_least=size.host_least,
                device_least=size.device_least,
            )
            for entry, size in zip(plan.processes, plan.needs, strict=True)
        ],
        notes=plan.notes,
        times=times,
    )


def times_of(found: Search, plans: tuple[Plan, Plan], source: str, replay: Replay | None) -> Times:
    """`plans` are those of the given and the best found topology."""
    given, best = plans
    steps = given.windows.steps
    expected = _expected(found.best, steps, best)
    return Times(
        source=source,
        replay=replay,
        given=_expected(found.given, steps, given),
        bounds=[_expected(one, steps) for one in found.bounds],
        best=Best(
            expected=expected,
            gain=found.gain,
            changes=changes(found.given.topology, found.best.topology),
        ),
        simulations=found.simulations,
        simulated_steps=found.steps,
        ended_early=found.ended_early,
    )


def memory_by_device(plan: Plan) -> dict[str, int]:
    """What all processes need, published weights included; devices and memory of several hosts are
    named with them."""
    found: dict[str, int] = {}
    for host, before, memory in _named_hosts(plan):
        found |= {f"{before}{card}": size for card, size in host.cards.items()}
        found[memory] = host.memory
    return found


def least_memory(plan: Plan) -> list[str]:
    """The names of those sizes that are no upper estimates."""
    found: list[str] = []
    for host, before, memory in _named_hosts(plan):
        found += [f"{before}{card}" for card in host.cards if card in host.cards_least]
        found += [memory] if host.memory_least else []
    return found


def _named_hosts(plan: Plan) -> Iterator[tuple[HostNeed, str, str]]:
    """Each host with what stands before its devices, and the name of its memory."""
    several = len(plan.hosts) > 1
    for host in plan.hosts:
        before = f"{host.name} " if several else ""
        yield host, before, f"{before}memory" if several else HOST


def _expected(one: Candidate, steps: int, plan: Plan | None = None) -> Expected:
    outcome = one.outcome
    return Expected(
        max_staleness=one.bound,
        engines=split_of(one.topology),
        seconds_per_step=one.seconds,
        hours=steps * one.seconds / 3600,
        bottleneck=outcome.bottleneck,
        busy=outcome.busy,
        work=outcome.work,
        trainer_wait=outcome.trainer_wait,
        staleness_mean=outcome.staleness_mean,
        staleness_max=outcome.staleness_max,
        memory=memory_by_device(plan) if plan is not None else {},
        memory_least=least_memory(plan) if plan is not None else [],
    )
