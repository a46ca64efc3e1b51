"""What is said where Ray cannot be had or has no room; the rest needs Ray
(`tests/integration/test_ray_hosts.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zppo.algorithm.methods import get_method
from zppo.config.load import convert
from zppo.errors import UserError
from zppo.plan.placement import check_placement
from zppo_actors.hosts.seats import Seat, bundle_of, connected, no_room
from zppo_actors.supervisor import children
from zppo_actors.supervisor.fleet import Fleet
from zppo_actors.supervisor.listening import over_tcp


def test_without_ray_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught:
        connected("auto", 1)
    assert str(caught.value) == (
        "cluster.launcher is 'ray', but Ray is not installed; expected: pip install 'zppo[ray]'"
    )


def test_a_pending_placement_is_explained() -> None:
    seats = [Seat("n1", "n1.key", 8), Seat("n2", "n2.key", 0)]
    nodes = [
        {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 96.0, "GPU": 8.0}},
        {"NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4.0}},
    ]
    assert no_room(seats, 600.0, nodes, "STRICT_SPREAD") == (
        "no room for n1 (1 CPU, 8 GPUs), n2 (1 CPU) within 600 s, each on a "
        "node of its own beside this one; the cluster has 2 nodes: 10.0.0.1 (96 CPU, 8 GPUs), "
        "10.0.0.2 (4 CPU, 0 GPUs)"
    )
    assert [bundle_of(seat) for seat in seats] == [{"CPU": 1, "GPU": 8}, {"CPU": 1}]


def test_where_hosts_may_share_nodes_the_sentence_says_so() -> None:
    nodes = [{"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 1.0}}]
    assert no_room([Seat("n1", "n1.key", 0)], 60.0, nodes, "PACK") == (
        "no room for n1 (1 CPU) within 60 s; the cluster has 1 node: 10.0.0.1 (1 CPU, 0 GPUs)"
    )


@pytest.mark.parametrize(
    ("cluster", "devices", "sentence"),
    [
        (
            {"ray_address": "local"},
            ["cpu"],
            "cluster.ray_address is 'local', a Ray cluster of this host alone; expected "
            "cluster.strategy PACK beside it, or the address of a cluster with more nodes",
        ),
        (
            {"ray_address": "ray://10.0.0.1:10001"},
            ["cpu"],
            "cluster.ray_address is 'ray://10.0.0.1:10001'; expected auto, local or HOST:PORT",
        ),
        (
            {"strategy": "PACK"},
            ["cuda:0"],
            "cluster.strategy is 'PACK', but trainer runs on cuda:0 of 'n0'; expected "
            "STRICT_SPREAD, because Ray gives out the cards of a node without knowing which of "
            "them a process of the first host uses",
        ),
    ],
)
def test_nodes_that_cannot_be_shared(
    cluster: dict[str, str], devices: list[str], sentence: str
) -> None:
    hosts = {"n0": {"address": "127.0.0.1"}, "n1": {}}
    topology = convert(
        {
            "data": {"train": "q"},
            "student": {"model": "s"},
            "cluster": {"launcher": "ray", "hosts": hosts, **cluster},
            "actors": {"rollout": {"hosts": ["n1"]}, "trainer": {"devices": devices}},
        },
        {"": "t.yaml"},
    )
    with pytest.raises(UserError) as caught:
        check_placement(topology, get_method(topology.method.name))
    assert str(caught.value) == sentence


def test_the_keepers_last_sentence_is_the_runs(tmp_path: Path) -> None:
    """A keeper that has given a host up has said so; one that Ray has ended has not."""
    fleet = Fleet(None, {}, {}, tmp_path, 20.0)  # type: ignore[arg-type]
    assert fleet.given_up() is None
    for script, sentence in [
        (
            "print('a warning'); print('cluster.launcher ray: n1 is given up'); exit(1)",
            "cluster.launcher ray: n1 is given up",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "cluster.launcher ray: the process that holds the hosts has lost Ray (ray was killed "
            "by SIGKILL), and the hosts with it; expected a Ray cluster whose head stays",
        ),
        (
            "print('GCS may have been killed'); exit(1)",
            "cluster.launcher ray: the process that holds the hosts has lost Ray (ray ended with "
            "exit code 1), and the hosts with it; expected a Ray cluster whose head stays",
        ),
    ]:
        fleet.keeper = children.spawn(
            [sys.executable, "-c", script], inherited=(), name="ray", role="ray", incarnation=0,
            log=tmp_path / "ray.log", env={},
        )  # fmt: skip
        assert fleet.keeper.exit_code != 0
        assert fleet.given_up() == sentence


@pytest.mark.parametrize("bind", [None, "0.0.0.0"])
def test_the_first_host_must_have_an_address(bind: str | None) -> None:
    topology = convert(
        {
            "data": {"train": "q"},
            "student": {"model": "s"},
            "cluster": {"launcher": "ray", "hosts": {"n0": {}, "n1": {}}},
            "transport": {"bind": bind},
            "actors": {"rollout": {"hosts": ["n1"]}},
        },
        {"": "t.yaml"},
    )
    with pytest.raises(UserError) as caught:
        over_tcp(topology, "cluster.port", None)
    assert str(caught.value) == (
        "cluster.hosts.n0.address is missing; expected the address of this host under which the "
        "other hosts reach it"
    )
