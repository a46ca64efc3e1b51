"""Where the controller listens, and what is said of an address that it cannot have."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from wires import free_port

from zppo.config.cluster import ClusterConfig, HostConfig, TransportConfig
from zppo.config.topology import ActorConfig, ActorsConfig, DataConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo_actors.supervisor.listening import MOST_FILES, listening, raise_file_limit
from zppo_protocol.addresses import tcp_endpoint

FOLDER = Path("/dev/shm/zppo-0-abc")


def topology(first: str | None = None, **transport: object) -> Topology:
    hosts = {"node-0": HostConfig(address=first)} if first else {}
    return Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        cluster=ClusterConfig(hosts=hosts),
        transport=TransportConfig(**transport),  # type: ignore[arg-type]
    )


def refusal(settings: Topology) -> str:
    with pytest.raises(UserError) as caught:
        listening(settings, FOLDER)
    return str(caught.value)


def test_one_host_has_a_socket_in_its_runtime_folder() -> None:
    assert listening(topology(), FOLDER) == (f"ipc://{FOLDER}/controller.sock",) * 2


def test_tcp_is_for_this_machine_unless_more_is_asked_for() -> None:
    bound, reached = listening(topology(kind="tcp"), FOLDER)
    assert bound == reached and tcp_endpoint(bound)[0] == "127.0.0.1"


def test_the_first_host_is_where_the_controller_listens() -> None:
    bound, reached = listening(topology("127.0.0.2", kind="tcp"), FOLDER)
    assert bound == reached and tcp_endpoint(bound)[0] == "127.0.0.2"


@pytest.mark.parametrize(("first", "reached_at"), [(None, "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_every_interface_is_reached_by_one_of_them(first: str | None, reached_at: str) -> None:
    port = free_port()
    settings = topology(first, kind="tcp", bind="0.0.0.0", port=port)
    assert listening(settings, FOLDER) == (f"tcp://0.0.0.0:{port}", f"tcp://{reached_at}:{port}")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(topology(kind="tcp", port=port)) == (
            f"transport.port is {port}, on which something listens at 127.0.0.1 already; expected a "
            "free one, or null"
        )


def test_an_address_of_another_host() -> None:
    """192.0.2.0/24 is for documentation: no host has it."""
    assert refusal(topology(kind="tcp", bind="192.0.2.1")) == (
        "the controller cannot listen at '192.0.2.1', which is no address of this host (Cannot "
        "assign requested address); expected one in transport.bind, or as the address of the first "
        "of cluster.hosts"
    )


def test_a_name_that_stands_for_this_host_alone() -> None:
    """As Debian has the name of a host in /etc/hosts."""

    def two(other: str) -> Topology:
        hosts = {"n0": HostConfig(address="localhost"), "n1": HostConfig(address=other)}
        actors = ActorsConfig(rollout=ActorConfig(hosts=["n1"]))
        return structs.replace(topology(), cluster=ClusterConfig(hosts=hosts), actors=actors)

    assert listening(two("127.0.0.2"), FOLDER)[1].startswith("tcp://localhost:")
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
