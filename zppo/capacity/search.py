"""Which split of the engine processes, and which bound on staleness, would train faster: found by
simulation, within a time.

What counts is the time for a trained token, because steps of a short simulation differ in what they
hold. Splits are tried at the topology's own bound, in the order of what the work alone would allow;
one that it forbids to be faster than the best found is left out, so a search that ends before its
time has missed none. Then other bounds are tried with the best split. Larger bounds are seldom
slower, so the best found is the smallest one that is within `CLOSE` of the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from msgspec import Struct, structs

from zppo.capacity.splits import split_of, splits, with_split
from zppo.config.topology import Topology
from zppo.simulation import Outcome, OutOfTime, World, simulate

BOUNDS = (0, 1, 2, 4, 8)
"""Values of `scheduler.max_staleness` that are tried besides the topology's own."""
MOST_STEPS = 24
"""Steps of a simulation, where the run has as many; at a large bound more, to fill its windows."""
BOUNDS_SHARE = 0.4
"""Part of the time in which other bounds are tried with the given split."""
TIMES = 12
"""A simulation takes at most so small a part of the search, unless it has too few steps then."""
CLOSE = 0.03
"""Times that differ by less than this share are taken as equal."""


class Candidate(Struct, frozen=True):
    """A topology, and what its run would come to."""

    topology: Topology
    outcome: Outcome

    @property
    def bound(self) -> int:
        return self.topology.scheduler.max_staleness

    @property
    def seconds(self) -> float:
        """of a step"""
        return self.outcome.seconds_per_step

    @property
    def pace(self) -> float:
        """Seconds for a trained token."""
        return self.seconds / self.outcome.tokens_per_step

    def beats(self, other: Candidate) -> bool:
        """Whether it is faster, by more than two simulations of the same world differ."""
        return self.pace * (1.0 + CLOSE) < other.pace


class Search(Struct, frozen=True, kw_only=True):
    """`bounds` are of the given split, in ascending order, the given bound among them."""

    given: Candidate
    bounds: list[Candidate]
    best: Candidate
    simulations: int
    steps: int
    ended_early: bool
    """whether its time was over before all was tried"""

    @property
    def gain(self) -> float:
        """How many times as many tokens the best found trains in the same time."""
        return self.given.pace / self.best.pace


class _Searcher:
    def __init__(
        self, world: World, most_steps: int, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._world, self._clock = world, clock
        self._until = self._end = clock() + seconds
        self.simulations, self.ended_early = 0, False
        first = self._least_steps(world.topology)
        begin = clock()
        self.given = Candidate(world.topology, simulate(world, first))
        each = max((clock() - begin) / first, 1e-9)
        self.steps = max(first, min(most_steps, int(seconds / TIMES / each)))
        if self.steps > first:
            self.given = Candidate(world.topology, simulate(world, self.steps))
        self.simulations = 1

    def tried(self, topology: Topology) -> Candidate | None:
        """None when the time is over."""
        steps = max(self.steps, self._least_steps(topology))
        world = structs.replace(self._world, topology=topology)
        with suppress(OutOfTime):
            outcome = simulate(world, steps, out_of_time=self._over)
            self.simulations += 1
            return Candidate(topology, outcome)
        return None

    def with_bounds(self, found: Sequence[Candidate], share: float = 1.0) -> list[Candidate]:
        """The found ones, all of one split, and those of the other bounds as far as this share of
        the time that is left is enough."""
        now = self._clock()
        self._until = now + share * (self._end - now)
        rest = [bound for bound in BOUNDS if all(one.bound != bound for one in found)]
        tried = [self.tried(with_bound(found[0].topology, bound)) for bound in rest]
        return sorted((one for one in [*found, *tried] if one), key=lambda one: one.bound)

    def best_split(self, fits: Callable[[Topology], bool]) -> Candidate:
        """The fastest split at the given bound."""
        self._until, best = self._end, self.given
        for least, split in sorted(self._promising(), key=lambda pair: pair[0]):
            if least * (1.0 + CLOSE) >= best.pace:
                break
            if self._over():
                self.ended_early = True
                break
            topology = with_split(self._world.topology, split)
            if not fits(topology):
                continue
            found = self.tried(topology)
            if found is None:
                self.ended_early = True
                break
            if found.beats(best):
                best = found
        return best

    def _promising(self) -> Iterator[tuple[float, dict[str, int]]]:
        """Other splits that the work does not forbid to be faster, with what it allows. There may
        be millions to go through."""
        given = split_of(self._world.topology)
        for split in splits(self._world.topology):
            if self._over():
                self.ended_early = True
                return
            least = self._least_pace(given, split)
            if split != given and least * (1.0 + CLOSE) < self.given.pace:
                yield least, split

    def _least_pace(self, before: Mapping[str, int], after: Mapping[str, int]) -> float:
        """What the work allows, laid to other numbers of engines."""
        outcome = self.given.outcome
        least = max(
            seconds * before[pool] / after[pool] if pool in before else seconds
            for pool, seconds in outcome.work.items()
        )
        return least / outcome.tokens_per_step

    @staticmethod
    def _least_steps(topology: Topology) -> int:
        """As many steps are measured as are left out while the windows in flight fill up."""
        return 2 * (topology.scheduler.max_staleness + 2)

    def _over(self) -> bool:
        return self._clock() > self._until


def search(
    world: World,
    most_steps: int,
    seconds: float,
    clock: Callable[[], float],
    fits: Callable[[Topology], bool] = lambda topology: True,
) -> Search:
    """Simulate the given world, and search for at most `seconds` of the `clock` in all, but for the
    given world itself. `fits` says whether a topology has room on its machines. Raises what
    `simulate` raises."""
    searcher = _Searcher(world, most_steps, seconds, clock)
    bounds = searcher.with_bounds([searcher.given], BOUNDS_SHARE)
    split = searcher.best_split(fits)
    if split is searcher.given:  # time that no split has taken is for the bounds that are left
        bounds = tried = searcher.with_bounds(bounds)
    else:
        tried = searcher.with_bounds([split])
    wanted = len({*BOUNDS, split.bound})
    fitting = [one for one in tried if one is split or fits(one.topology)]
    return Search(
        given=searcher.given,
        bounds=bounds,
        best=_best(fitting),
        simulations=searcher.simulations,
        steps=searcher.steps,
        ended_early=searcher.ended_early or min(len(bounds), len(tried)) < wanted,
    )


def with_bound(topology: Topology, max_staleness: int) -> Topology:
    scheduler = structs.replace(topology.scheduler, max_staleness=max_staleness)
    return structs.replace(topology, scheduler=scheduler)


def _best(tried: Iterable[Candidate]) -> Candidate:
    tried = sorted(tried, key=lambda one: one.bound)
    fastest = min(tried, key=lambda one: one.pace)
    return next(one for one in tried if not fastest.beats(one))
