"""The processes of several hosts as a person reads them: equal hosts once, and processes of a host
that differ in nothing but their card in one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from msgspec import Struct
from rich.table import Table

from zppo.plan.machine import at_most, gib
from zppo.plan.memory import Need
from zppo.plan.placement import bind_address, transport_kind
from zppo.plan.plan import HostNeed, Plan
from zppo.plan.processes import ProcessEntry

CONTROLLER = "controller"


class Row(Struct, frozen=True):
    """Processes of one host that differ in their card alone."""

    count: int
    pool: str
    cards: tuple[str, ...]
    engine: str
    threads: int
    memory: str
    device_memory: str


class Group(Struct, frozen=True):
    """Hosts that run the same."""

    hosts: list[str]
    rows: tuple[Row, ...]


def host_groups(plan: Plan) -> list[Group]:
    """The controller by itself, then the hosts, equal ones together."""
    found: dict[tuple[Row, ...], list[str]] = {}
    for host in plan.hosts:
        found.setdefault(_rows(host), []).append(host.name)
    first = plan.processes[0]
    need = plan.needs[0]
    alone = Row(1, CONTROLLER, (), "-", first.threads, host_memory(need), device_memory(need))
    groups = [Group(names, rows) for rows, names in found.items() if rows]
    return [Group([first.host], (alone,)), *groups]


def host_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Names and values of the facts that only a run over several hosts has."""
    transport, kind = plan.topology.transport, transport_kind(plan.topology)
    port = f"port {transport.port}" if transport.port else "any free port"
    by_need: dict[tuple[str, str], list[str]] = {}
    for host in plan.hosts:
        size = at_most(host.memory, least=host.memory_least)
        by_need.setdefault((size, gib(host.shared)), []).append(host.name)
    memory = "; ".join(
        f"{size} on {_each(names)}, {shared} of it published weights"
        for (size, shared), names in by_need.items()
    )
    yield "hosts", f"{len(plan.hosts)}, cluster.launcher {plan.topology.cluster.launcher}"
    address = bind_address(plan.topology) or f"the address of {plan.hosts[0].name}"
    yield "transport", f"{kind} with CURVE on {address}, {port}"
    yield "memory", memory


def host_memory(need: Need) -> str:
    """What a process needs on its host: at most so much, unless it says at least."""
    return _size(need.host, need.host_least)


def device_memory(need: Need) -> str:
    """The same on each of its cards."""
    return _size(need.device, need.device_least) if need.device or need.device_least else "-"


def _size(size: int, least: bool) -> str:
    return f"at least {gib(size)}" if least else gib(size)


def processes_by_host(plan: Plan) -> Table:
    table = Table(title="processes, and the memory of each", title_justify="left")
    for name in ("on each of", "processes", "devices", "engine"):
        table.add_column(name)
    for name in ("threads", "host", "device"):
        table.add_column(name, justify="right")
    for group in host_groups(plan):
        for row in group.rows:
            first = row is group.rows[0]
            table.add_row(
                span(group.hosts) if first else "",
                f"{row.count} {row.pool}",
                span(row.cards) or "-",
                row.engine,
                str(row.threads),
                row.memory,
                row.device_memory,
            )
        table.add_section()
    return table


def span(names: Sequence[str]) -> str:
    """`node-0 … node-7` where the numbers at the ends of names follow one another; else the
    names."""
    if len(names) < 3:
        return ", ".join(names)
    stem = names[0].rstrip("0123456789")
    numbers = [name.removeprefix(stem) for name in names if name.startswith(stem)]
    if len(numbers) < len(names) or not all(number.isdecimal() for number in numbers):
        return ", ".join(names)
    first = int(numbers[0])
    follow = [int(number) for number in numbers] == list(range(first, first + len(names)))
    return f"{names[0]} … {names[-1]}" if follow else ", ".join(names)


def _each(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {span(names)}"


def _rows(host: HostNeed) -> tuple[Row, ...]:
    placed = [
        pair for pair in zip(host.processes, host.needs, strict=True) if pair[0].role != CONTROLLER
    ]

    def kind(entry: ProcessEntry) -> tuple[str, str, int]:
        engine = entry.served.actor.engine if entry.served is not None else "-"
        return entry.pool, engine, entry.threads

    rows = []
    for (key, memory, device), alike in groupby(
        placed, lambda pair: (kind(pair[0]), host_memory(pair[1]), device_memory(pair[1]))
    ):
        entries = [entry for entry, _ in alike]
        devices = [name for entry in entries for name in entry.cards or [entry.device] if name]
        cards = tuple(sorted(set(devices), key=_number))
        pool, engine, threads = key
        rows.append(Row(len(entries), pool, cards, engine, threads, memory, device))
    return tuple(rows)


def _number(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    return kind, int(index or 0)
