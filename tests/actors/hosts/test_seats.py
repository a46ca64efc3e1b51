"""What is said where Ray cannot be had or has no room; the rest needs Ray
(`tests/integration/test_ray_hosts.py`)."""

from __future__ import annotations

import sys

import pytest

from zppo.config.load import convert
from zppo.errors import UserError
from zppo_actors.hosts.seats import Seat, bundle_of, connected, pending
from zppo_actors.supervisor.listening import over_tcp


def test_without_ray_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught:
        connected()
    assert str(caught.value) == (
        "cluster.launcher is 'ray', but Ray is not installed; expected: pip install 'zppo[ray]'"
    )


def test_a_pending_placement_is_explained() -> None:
    seats = [Seat("n1", "n1.key", 8), Seat("n2", "n2.key", 0)]
    nodes = [
        {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 96.0, "GPU": 8.0}},
        {"NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4.0}},
    ]
    assert pending(seats, 600.0, nodes) == (
        "cluster.launcher ray: no room for n1 (1 CPU, 8 GPUs), n2 (1 CPU) within 600 s, each on a "
        "node of its own beside this one; the cluster has 2 nodes: 10.0.0.1 (96 CPU, 8 GPUs), "
        "10.0.0.2 (4 CPU, 0 GPUs)"
    )
    assert [bundle_of(seat) for seat in seats] == [{"CPU": 1, "GPU": 8}, {"CPU": 1}]


def test_the_first_host_must_have_an_address() -> None:
    topology = convert(
        {
            "data": {"train": "q"},
            "student": {"model": "s"},
            "cluster": {"launcher": "ray", "hosts": {"n0": {}, "n1": {}}},
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
