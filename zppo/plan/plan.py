"""The plan of a run: what `--dry-run` shows, and what is checked against the machine."""

from __future__ import annotations

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


class Plan(Struct, frozen=True, kw_only=True):
    """Everything `--dry-run` shows."""

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
    def host_bytes(self) -> int:
        """Memory of the host, published policies included."""
        return sum(entry.host for entry in self.needs) + self.shared
