"""The further hosts of a run are asked for before it begins, and let go when it is over.

Their key files lie in a folder of the user's, mode 0700, for as long as the run lives: whoever
starts `zppo join` on a host takes that host's file there, or finds it on a shared file system.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.fingerprint import fingerprint
from zppo.plan.placement import cards_of, used_hosts
from zppo.plan.processes import ProcessEntry, processes
from zppo.records.run_directory import RunRecord
from zppo.signals import Interrupts
from zppo_actors.own_time import Patience
from zppo_actors.supervisor import children
from zppo_actors.supervisor.children import Child
from zppo_actors.supervisor.fleet import Fleet, versions
from zppo_actors.supervisor.listening import over_tcp
from zppo_actors.supervisor.run_attempt import View
from zppo_protocol import keys
from zppo_protocol.limits import MIB, Limits
from zppo_protocol.sockets import Router

ROLE = "host"
TICK_SECONDS = 0.1
LEAVE_SECONDS = 10.0
RAY = "ray"
RAY_SPARE_SECONDS = 30.0
"""Ray is given up first, because it knows the reason."""
NOTHING: Mapping[str, str] = MappingProxyType({})
LIMITS = Limits(header_bytes=8 * MIB, payload_bytes=MIB)


class Interrupted(Exception):
    """Ctrl-C while hosts were waited for."""


@contextlib.contextmanager
def gathered(
    run_dir: Path, record: RunRecord, key_folder: Path, view: View, interrupts: Interrupts
) -> Iterator[Fleet | None]:
    """All further hosts of the run, once they have joined; None where there are none.

    Raises UserError if one does not join within `cluster.join_seconds`, Interrupted on Ctrl-C; then
    those that have joined are let go.
    """
    topology = record.topology
    further = used_hosts(topology)[1:]
    if not further:
        yield None
        return
    ear = over_tcp(topology, "cluster.port", topology.cluster.port)
    roles = dict.fromkeys(further, ROLE)
    access, credentials = keys.issue(ear.bound, roles, reached_at=ear.reached)
    router = Router(access, LIMITS, ear.socket.detach())
    fleet = Fleet(router, folders_of(topology), versions(), run_dir, topology.cluster.lease_seconds)
    try:
        for name, one in credentials.items():
            keys.write_credentials(keys.key_file(key_folder, name), one)
        if topology.cluster.launcher == RAY:
            fleet.keeper = taken_seats(run_dir, topology, key_folder)
        else:
            view.log(asking(further, key_folder, topology.cluster.join_seconds))
        nameless = looked_up(topology, further)
        wait_for_all(fleet, topology.cluster.join_seconds, view, interrupts, nameless)
        yield fleet
    finally:
        fleet.dismiss()
        if fleet.keeper is not None:
            let_go(fleet.keeper)
        router.close()
        remove_keys(key_folder, further)


def remove_keys(folder: Path, hosts: Iterable[str]) -> None:
    """Take away the key files, and their folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for host in hosts:
            keys.key_file(folder, host).unlink(missing_ok=True)
        folder.rmdir()


def taken_seats(run_dir: Path, topology: Topology, key_folder: Path) -> Child:
    """The process that asks Ray for the hosts (`zppo_actors.hosts.seats`)."""
    seats = [
        {
            "host": host,
            "key_file": str(keys.key_file(key_folder, host)),
            "cards": cards_of(topology, host),
        }
        for host in used_hosts(topology)[1:]
    ]
    options = ["--seats", msgspec.json.encode(seats).decode()]
    options += ["--wait", str(topology.cluster.join_seconds)]
    options += [f"--address={topology.cluster.ray_address}"]
    options += ["--strategy", topology.cluster.strategy]
    return children.spawn(
        [sys.executable, "-P", "-m", "zppo_actors", "seats", *options],
        name=RAY,
        role=RAY,
        incarnation=0,
        log=run_dir / "logs" / f"{RAY}.log",
        env={},
        inherited=(),
    )


def let_go(seats: Child) -> None:
    """The agents leave, and with them their seats; Ray takes away what is left when its driver is
    gone."""
    patience = Patience(LEAVE_SECONDS)
    while not seats.ended and not patience.over:
        time.sleep(TICK_SECONDS)
    seats.kill()


def wait_for_all(
    fleet: Fleet,
    seconds: float,
    view: View,
    interrupts: Interrupts,
    known: Mapping[str, str] = NOTHING,
) -> None:
    """Until every host is there. What is `known` of those that are missing, meanwhile too, is said
    once. Raises UserError after `seconds`, with it, or when the process that holds their seats has
    ended; Interrupted on Ctrl-C."""
    said: set[str] = set()
    patience = Patience(seconds + (RAY_SPARE_SECONDS if fleet.keeper is not None else 0.0))
    while missing := fleet.missing():
        if interrupts.count:
            raise Interrupted
        if (sentence := fleet.given_up()) is not None:
            raise UserError(sentence)
        for line in fleet.turn():
            view.log(line)
        for name in [name for name in list(known) if name not in said]:
            said.add(name)
            view.log(f"warning: {name}: {known[name]}")
        if patience.over:
            whys = {name: why or known.get(name, "") for name, why in missing.items()}
            reasons = [f"{name} ({why})" if why else name for name, why in whys.items()]
            raise UserError(
                f"cluster.hosts: {', '.join(reasons)} did not join within {seconds:g} s "
                "(cluster.join_seconds); nothing was started"
            )
        time.sleep(TICK_SECONDS)


def looked_up(topology: Topology, hosts: Iterable[str]) -> Mapping[str, str]:
    """The hosts whose address names nothing here, and the words for it; it is filled meanwhile,
    because a resolver that does not answer takes its time for each name."""
    found: dict[str, str] = {}
    arguments = (topology, tuple(hosts), found)
    threading.Thread(target=_look_up, args=arguments, name="addresses", daemon=True).start()
    return found


def _look_up(topology: Topology, hosts: Iterable[str], found: dict[str, str]) -> None:
    """Look the addresses up one by one. The hosts are waited for all the same: the name of a host
    that is only being started comes with it, as in Kubernetes.

    consumes: the topology. produces: entries of `found`. waits for: the resolver. is unblocked by:
    its answers; the end of the process does not wait for it."""
    for host in hosts:
        address = topology.cluster.hosts[host].address
        try:
            if address is not None:
                socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        except OSError as error:
            found[host] = f"its address {address!r} names no host here: {error.strerror}"


def asking(hosts: list[str], key_folder: Path, seconds: float) -> str:
    """What a person has to do, once; a key file is named and never shown."""
    lines = [f"waiting for {', '.join(hosts)}, at most {seconds:g} s; run there:"]
    lines += [f"  {host}: zppo join --key {keys.key_file(key_folder, host)}" for host in hosts]
    return "\n".join(lines)


def folders_of(topology: Topology) -> dict[str, dict[str, str]]:
    """Which model folders each further host needs, and their fingerprints."""
    first, *further = used_hosts(topology)
    folders: dict[str, set[str]] = {host: set() for host in further}
    for entry in processes(topology, 1):
        if entry.host != first:
            folders[entry.host] |= models_of(entry, topology)
    prints = {path: fingerprint(Path(path)) for path in sorted(set().union(*folders.values()))}
    return {host: {path: prints[path] for path in sorted(of)} for host, of in folders.items()}


def models_of(entry: ProcessEntry, topology: Topology) -> set[str]:
    """The model folders that a process reads, of which this host can tell the fingerprint."""
    named = {topology.student.model} if entry.role == "rank" else set()
    if entry.served is not None and entry.served.model.model:
        named.add(str(entry.served.folder))
    return {path for path in named if Path(path).is_dir()}
