"""The plan of a run: what `--dry-run` shows, and what is checked against the machines."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from zppo.algorithm.methods import Method
from zppo.config.topology import Topology
from zppo.plan.disk import DiskNeed
from zppo.plan.memory import Need
from zppo.plan.processes import ProcessEntry


class Windows(Struct, frozen=True, kw_only=True):
    """Sizes of one window and of the run, in questions, groups and steps."""

    new: int
    replayed: int
    reformulated: int
    steps: int
    largest_bytes: int

    @property
    def groups(self) -> int:
        """The most groups of the student in one window."""
        return self.new + self.replayed + self.reformulated


class Work(Struct, frozen=True, kw_only=True):
    """The most requests of a kind to teachers in a step, and the most tokens that they read and
    write."""

    kind: str
    requests: int
    tokens: int


class HostNeed(Struct, frozen=True, kw_only=True):
    """What one host runs and needs, in bytes: `memory` with the published weights, which are
    `shared`; `cards` by name."""

    name: str
    processes: list[ProcessEntry]
    needs: list[Need]
    shared: int

    @property
    def memory(self) -> int:
        return sum(need.host for need in self.needs) + self.shared

    @property
    def memory_least(self) -> bool:
        """Whether `memory` is the least and not the most that it needs."""
        return any(need.host_least for need in self.needs)

    @property
    def cards_least(self) -> set[str]:
        """Cards of which the same holds."""
        placed = zip(self.processes, self.needs, strict=True)
        return {card for entry, need in placed if need.device_least for card in entry.cards}

    @property
    def cards(self) -> dict[str, int]:
        found = Counter[str]()
        for entry, need in zip(self.processes, self.needs, strict=True):
            for card in entry.cards:
                found[card] += need.device
        return dict(sorted(found.items(), key=lambda pair: int(pair[0].removeprefix("cuda:"))))


class Plan(Struct, frozen=True, kw_only=True):
    """Everything `--dry-run` shows. `shared`: bytes of the published weights on a host that has
    them."""

    topology: Topology
    method: Method
    processes: list[ProcessEntry]
    needs: list[Need]
    shared: int
    disk: DiskNeed
    windows: Windows
    teacher_work: list[Work]
    notes: list[str]

    @property
    def hosts(self) -> list[HostNeed]:
        """By host, the controller's first. Weights are published by the first rank, and copied once
        to each host that has an engine of the student."""
        names = dict.fromkeys(entry.host for entry in self.processes)
        return [self._host(name) for name in names]

    def _host(self, name: str) -> HostNeed:
        placed = zip(self.processes, self.needs, strict=True)
        here = [(entry, need) for entry, need in placed if entry.host == name]
        holds = any(entry.role in ("trainer", "rollout") for entry, _ in here)
        return HostNeed(
            name=name,
            processes=[entry for entry, _ in here],
            needs=[need for _, need in here],
            shared=self.shared if holds else 0,
        )
