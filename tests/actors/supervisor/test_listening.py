"""Where the controller listens, and what is said of an address that it cannot have."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from unshared import NETWORK, run_unshared
from wires import free_port

from zppo.config.cluster import ClusterConfig, HostConfig, TransportConfig
from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    StudentConfig,
    Topology,
    TrainerConfig,
)
from zppo.errors import UserError
from zppo_actors.runtime import MEETING_PORT
from zppo_actors.supervisor import listening
from zppo_actors.supervisor.listening import MOST_FILES, opened, raise_file_limit
from zppo_protocol.addresses import tcp_endpoint

FOLDER = Path("/dev/shm/zppo-0-abc")
BOTH = ["n0", "n1"]


def topology(first: str | None = None, **transport: object) -> Topology:
    hosts = {"node-0": HostConfig(address=first)} if first else {}
    return Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        cluster=ClusterConfig(hosts=hosts),
        transport=TransportConfig(**transport),  # type: ignore[arg-type]
    )


def ranks_on_two(port: int | None, first: str = "127.0.0.1") -> Topology:
    """A trainer over this host and one that there is not."""
    hosts = {"n0": HostConfig(address=first), "n1": HostConfig(address="127.0.0.2")}
    actors = ActorsConfig(trainer=TrainerConfig(hosts=BOTH, ranks=2, port=port))
    listens = topology(bind="127.0.0.1")
    return structs.replace(listens, cluster=ClusterConfig(hosts=hosts), actors=actors)


def addresses(settings: Topology) -> tuple[str, str]:
    with opened(settings) as ears:
        return ears.addresses(FOLDER)


def refusal(settings: Topology) -> str:
    with pytest.raises(UserError) as caught, opened(settings):
        pass
    return str(caught.value)


def test_one_host_has_a_socket_in_its_runtime_folder() -> None:
    assert addresses(topology()) == (f"ipc://{FOLDER}/controller.sock",) * 2


def test_tcp_is_for_this_machine_unless_more_is_asked_for() -> None:
    bound, reached = addresses(topology(kind="tcp"))
    assert bound == reached and tcp_endpoint(bound)[0] == "127.0.0.1"


def test_the_first_host_is_where_the_controller_listens() -> None:
    bound, reached = addresses(topology("127.0.0.2", kind="tcp"))
    assert bound == reached and tcp_endpoint(bound)[0] == "127.0.0.2"


@pytest.mark.parametrize(("first", "reached_at"), [(None, "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_every_interface_is_reached_by_one_of_them(first: str | None, reached_at: str) -> None:
    port = free_port()
    settings = topology(first, kind="tcp", bind="0.0.0.0", port=port)
    assert addresses(settings) == (f"tcp://0.0.0.0:{port}", f"tcp://{reached_at}:{port}")


def test_every_interface_of_both_kinds_is_one_socket() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    with opened(topology("127.0.0.1", kind="tcp", bind="::")) as ears:
        assert ears.controller is not None
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, ears.controller.port)).close()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "LET_GO_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(topology(kind="tcp", port=port)) == (
            f"transport.port is {port}, on which something listens at 127.0.0.1 already; expected a "
            "free one, or null"
        )
        assert refusal(ranks_on_two(port)) == (
            f"actors.trainer.port is {port}, on which something listens at 127.0.0.1 already; "
            "expected a free one, or null"
        )


def test_a_port_that_a_killed_run_is_about_to_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(listening.time, "sleep", lambda seconds: other.close())
        bound, _ = addresses(topology(kind="tcp", port=port))
    assert bound == f"tcp://127.0.0.1:{port}"


def test_more_processes_than_a_queue_holds_by_default_wait_for_their_controller() -> None:
    """And none of them is left to that of the next attempt."""
    with contextlib.ExitStack() as held, opened(topology(kind="tcp")) as ears:
        assert ears.controller is not None
        address = ears.controller.socket.getsockname()
        many = [socket.create_connection(address, timeout=60.0) for _ in range(200)]
        for one in many:
            held.enter_context(one)
        ears.hang_up()
        assert {one.recv(1) for one in many} == {b""}
        with socket.create_connection(address) as late:
            assert ears.controller.socket.accept()[1] == late.getsockname()


def test_a_port_for_the_mighty_alone() -> None:
    """As a user who may not listen below 1024; root may."""
    with pytest.raises(UserError) as caught:
        raise listening.no_ear(PermissionError(errno.EACCES, "no"), "127.0.0.1", 80, "cluster.port")
    assert str(caught.value) == (
        "cluster.port is 80, which this user may not listen on; expected one from 1024 on, or null"
    )


def test_a_host_that_has_given_out_all_its_ports() -> None:
    """In a network of its own, which gives out one port; somebody has it."""
    script = """
import socket, subprocess
from pathlib import Path
from zppo.errors import UserError
from zppo_actors.supervisor.listening import listener
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
held = listener("127.0.0.1", None, "transport.port")
try:
    listener("127.0.0.1", None, "transport.port")
except UserError as error:
    print(held.getsockname()[1], error)
"""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip (iproute2)")
    said = run_unshared(NETWORK, script)
    assert said.stdout == (
        "40000 transport.port is null, and this host has no free port at 127.0.0.1: all that the "
        "system gives out (net.ipv4.ip_local_port_range) are taken; expected one beyond these, or "
        "some of them to be free again\n"
    ), said.stderr


def test_ranks_on_several_hosts_meet_at_the_first_alone() -> None:
    with opened(ranks_on_two(None)) as ears:
        assert ears.ranks is not None and ears.controller is not None
        assert ears.ranks.socket.getsockname()[0] == "127.0.0.1"
        assert ears.of("trainer") == [ears.ranks.socket.fileno()] and ears.of("rank") == []
        assert ears.told("rank") == {MEETING_PORT: str(ears.ranks.port)}
        assert ears.told("trainer") == ears.told("rollout") == {}
        assert ears.of("controller") == [ears.controller.socket.fileno()]
    assert listening.Ears().of("trainer") == [] and listening.Ears().told("rank") == {}


def test_an_address_of_another_host() -> None:
    """192.0.2.0/24 is for documentation: no host has it."""
    assert refusal(topology(kind="tcp", bind="192.0.2.1")) == (
        "the controller cannot listen at '192.0.2.1', which is no address of this host (Cannot "
        "assign requested address); expected one in transport.bind, or as the address of the first "
        "of cluster.hosts"
    )


def test_ranks_cannot_meet_at_an_address_of_another_host() -> None:
    assert refusal(ranks_on_two(None, "192.0.2.1")) == (
        "the ranks of the trainer cannot meet at '192.0.2.1', which is no address of this host "
        "(Cannot assign requested address); expected its own as the address of the first of "
        "cluster.hosts"
    )


def test_a_name_that_stands_for_this_host_alone() -> None:
    """As Debian has the name of a host in /etc/hosts."""

    def two(other: str) -> Topology:
        hosts = {"n0": HostConfig(address="localhost"), "n1": HostConfig(address=other)}
        actors = ActorsConfig(rollout=ActorConfig(hosts=["n1"]))
        return structs.replace(topology(), cluster=ClusterConfig(hosts=hosts), actors=actors)

    assert addresses(two("127.0.0.2"))[1].startswith("tcp://localhost:")
    # What stands for an address is known only where it is looked up.
    assert refusal(two("192.0.2.1")) == (
        "cluster.hosts.n0.address is 'localhost' (127.0.0.1 there), so n1 cannot reach the "
        "controller; expected an address of the first host under which the other hosts reach it"
    )


@pytest.fixture
def few_files() -> Iterator[int]:
    """This process may have few open files, and could have as many as are returned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_strangers_have_to_open_many_connections(few_files: int) -> None:
    raise_file_limit()
    wanted = MOST_FILES if few_files == resource.RLIM_INFINITY else min(few_files, MOST_FILES)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, few_files)
