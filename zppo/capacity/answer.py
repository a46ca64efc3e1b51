"""What `zppo plan` answers: one value, shown to people by `zppo.capacity.view` and written as JSON
as it is."""

from __future__ import annotations

from msgspec import Struct

from zppo.capacity.search import Candidate, Search
from zppo.capacity.splits import changes, split_of
from zppo.plan.plan import Plan

HOST = "host"


class Process(Struct, frozen=True, kw_only=True):
    """One process of the plan; memory in bytes, the most that it needs, on each of its devices."""

    name: str
    host: str
    device: str
    engine: str
    threads: int
    host_bytes: int
    device_bytes: int


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
    expected = _expected(found.best, steps, memory_by_device(best))
    return Times(
        source=source,
        replay=replay,
        given=_expected(found.given, steps, memory_by_device(given)),
        bounds=[_expected(one, steps, {}) for one in found.bounds],
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
    """The most that all processes need, published weights included; devices and memory of several
    hosts are named with them."""
    several = len(plan.hosts) > 1
    found: dict[str, int] = {}
    for host in plan.hosts:
        before = f"{host.name} " if several else ""
        found |= {f"{before}{card}": size for card, size in host.cards.items()}
        found[f"{before}memory" if several else HOST] = host.memory
    return found


def _expected(one: Candidate, steps: int, memory: dict[str, int]) -> Expected:
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
        memory=memory,
    )
