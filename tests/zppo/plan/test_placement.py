"""Which process runs on which host and card, and what cannot be laid out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.algorithm.methods import get_method
from zppo.config.load import convert
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.placement import (
    bind_address,
    cards_of,
    check_placement,
    refuse_unbuilt,
    transport_kind,
    used_hosts,
)
from zppo.plan.processes import processes

TWO = {"n0": {"address": "10.0.0.1", "cores": 8}, "n1": {"address": "node-1.example.org"}}
BOTH = ["n0", "n1"]


def topology_of(**sections: object) -> Topology:
    data = {"data": {"train": "q"}, "student": {"model": "s"}, "teacher": {"model": "t"}}
    return convert({**data, **sections}, {"": "t.yaml"})


def check(topology: Topology) -> None:
    check_placement(topology, get_method(topology.method.name))


def vllm(size: int, devices: list[str], **others: object) -> dict[str, object]:
    arguments = {"tensor_parallel_size": size}
    return {"engine": "vllm", "devices": devices, "engine_args": arguments, **others}


def test_without_a_cluster_everything_runs_here() -> None:
    topology = topology_of()
    assert {entry.host for entry in processes(topology, 4)} == {"localhost"}
    assert (transport_kind(topology), bind_address(topology)) == ("ipc", "127.0.0.1")
    check(topology)
    refuse_unbuilt(topology)


def test_localhost_is_the_first_host() -> None:
    topology = topology_of(cluster={"hosts": TWO}, actors={"rollout": {"hosts": ["n1"]}})
    hosts = {entry.name: entry.host for entry in processes(topology, 4)}
    assert hosts == {
        "controller": "n0",
        "trainer": "n0",
        "rollout-0": "n1",
        "teacher-0": "n0",
        "grader-0": "n0",
        "weights-0": "n0",
        "weights-1": "n1",
    }
    assert (transport_kind(topology), bind_address(topology)) == ("tcp", "10.0.0.1")
    check(topology)


def test_hosts_have_equal_blocks_and_give_out_their_devices_in_turn() -> None:
    topology = topology_of(
        cluster={"hosts": TWO},
        actors={
            "rollout": {"count": 6, "hosts": BOTH, "devices": ["cuda:0", "cuda:1"]},
            "trainer": {"devices": ["cuda:2", "cuda:3"], "hosts": BOTH},
            "grader": {"count": 4, "hosts": BOTH},
        },
    )
    check(topology)
    table = {entry.name: (entry.host, entry.device) for entry in processes(topology, 4)}
    assert [table[f"rollout-{i}"] for i in range(6)] == [
        *(("n0", "cuda:0"), ("n0", "cuda:1"), ("n0", "cuda:0")),
        *(("n1", "cuda:0"), ("n1", "cuda:1"), ("n1", "cuda:0")),
    ]
    assert [table[name] for name in ("trainer", "trainer-1", "trainer-2", "trainer-3")] == [
        *(("n0", "cuda:2"), ("n0", "cuda:3")),
        *(("n1", "cuda:2"), ("n1", "cuda:3")),
    ]
    assert [table[f"grader-{i}"][0] for i in range(4)] == ["n0", "n0", "n1", "n1"]


@given(
    hosts=st.integers(1, 5),
    each=st.integers(1, 4),
    cards=st.integers(1, 4),
    ranks=st.integers(1, 4),
    cores=st.integers(1, 64),
)
def test_every_host_has_the_same_and_its_cores_are_shared_out(
    hosts: int, each: int, cards: int, ranks: int, cores: int
) -> None:
    names = [f"h{i}" for i in range(hosts)]
    facts = {name: {"address": "10.0.0.1", "cores": cores} for name in names}
    topology = topology_of(
        cluster={"hosts": facts},
        actors={
            "rollout": {
                "count": hosts * each,
                "hosts": names,
                "devices": [f"cuda:{i}" for i in range(cards)],
            },
            "teacher": {"count": hosts, "hosts": names},
            "trainer": {"hosts": names, "ranks": hosts * ranks},
        },
    )
    check(topology)
    table = processes(topology, 1)
    for host in names:
        entries = [entry for entry in table if entry.host == host and entry.device]
        assert Counter(entry.pool for entry in entries) == Counter(
            {"rollout": each, "teacher": 1, "trainer": ranks}
        )
        devices = Counter(entry.device for entry in entries if entry.pool == "rollout")
        assert max(devices.values()) - min(devices.values()) <= 1
        assert len({entry.threads for entry in entries}) == 1
        assert entries[0].threads == max(1, cores // len(entries))
    assert used_hosts(topology) == names


def test_an_engine_over_several_cards_has_them_all() -> None:
    topology = topology_of(
        actors={"rollout": vllm(2, ["cuda:0", "cuda:2"], count=2), "trainer": {"device": "cuda:4"}}
    )
    cards = {entry.name: entry.cards for entry in processes(topology, 1) if entry.cards}
    assert cards == {
        "trainer": ["cuda:4"],
        "rollout-0": ["cuda:0", "cuda:1"],
        "rollout-1": ["cuda:2", "cuda:3"],
    }
    check(topology)


REFUSALS = [
    (
        {"cluster": {"hosts": TWO}, "actors": {"rollout": {"hosts": ["n2"]}}},
        "actors.rollout.hosts names 'n2'; expected localhost or a host of cluster.hosts (did you "
        "mean 'n1'?)",
    ),
    (
        {"actors": {"grader": {"hosts": ["a"]}}},
        "actors.grader.hosts names 'a'; expected localhost or a host of cluster.hosts (there is "
        "none: cluster.hosts is empty)",
    ),
    (
        {"actors": {"trainer": {"hosts": []}}},
        "actors.trainer.hosts is empty; expected at least one host, such as localhost",
    ),
    (
        {"cluster": {"hosts": TWO}, "actors": {"rollout": {"hosts": ["n0", "localhost"]}}},
        "actors.rollout.hosts names 'n0' twice; expected each host once",
    ),
    (
        {"cluster": {"hosts": TWO}, "actors": {"teacher": {"count": 3, "hosts": BOTH}}},
        "actors.teacher.count is 3 over 2 hosts; expected a multiple of 2, because each host runs "
        "an equal part",
    ),
    (
        {"cluster": {"hosts": TWO}, "actors": {"trainer": {"ranks": 3, "hosts": BOTH}}},
        "actors.trainer.ranks is 3 over 2 hosts; expected a multiple of 2, because each host runs "
        "an equal part",
    ),
    (
        {
            "cluster": {"hosts": TWO},
            "actors": {
                "trainer": {"ranks": 2, "hosts": BOTH, "devices": ["cuda:0", "cuda:1"]},
            },
        },
        "actors.trainer.ranks is 2, but actors.trainer.devices names 2 on each of 2 hosts; "
        "expected one for each rank, or cpu alone for all",
    ),
    (
        {"cluster": {"hosts": TWO}, "actors": {"trainer": {"hosts": ["n1"]}}},
        "actors.trainer.hosts begins with 'n1'; expected 'n0', the first of cluster.hosts, because "
        "the first rank writes checkpoints into run.directory",
    ),
    (
        {"cluster": {"hosts": {"n0": {}, "n1": {}}}, "actors": {"rollout": {"hosts": ["n1"]}}},
        "cluster.hosts.n0.address is missing; expected the IP address or name under which the "
        "other hosts reach it",
    ),
    (
        {"cluster": {"hosts": {"n 0": {}}}},
        "cluster.hosts has a host 'n 0'; expected a name of letters, digits, dashes and "
        "underscores, other than 'localhost'",
    ),
    (
        {"cluster": {"hosts": {"localhost": {}}}},
        "cluster.hosts has a host 'localhost'; expected a name of letters, digits, dashes and "
        "underscores, other than 'localhost'",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "10.0.0.1:5555"}}}},
        "cluster.hosts.n0.address is '10.0.0.1:5555'; expected an IP address or the name of a "
        "host, without a port",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "10.0.0.300"}}}},
        "cluster.hosts.n0.address is '10.0.0.300'; expected an IP address or the name of a host, "
        "without a port",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "0.0.0.0"}}}},
        "cluster.hosts.n0.address is '0.0.0.0'; expected the address under which other hosts reach "
        "it",
    ),
    (
        {"cluster": {"hosts": {"n0": {"cards": 8}}}},
        "cluster.hosts.n0.cards is 8; expected card_gib beside it",
    ),
    (
        {"actors": {"rollout": {"devices": []}}},
        "actors.rollout.devices is empty; expected at least one device, such as cpu or cuda:0",
    ),
    (
        {"actors": {"rollout": {"devices": ["cuda:x"]}}},
        "actors.rollout.devices names 'cuda:x'; expected cpu, cuda or cuda:N",
    ),
    (
        {"actors": {"rollout": {"devices": ["cuda:0", "cuda:0"]}}},
        "actors.rollout.devices names 'cuda:0' twice; expected each card once (count gives more "
        "processes, and devices are given out in turn)",
    ),
    (
        {"actors": {"rollout": vllm(2, ["cuda:0", "cuda:1"], count=2)}},
        "cuda:1 is given to rollout-0, an engine over cuda:0 to cuda:1 (tensor_parallel_size 2), "
        "and to rollout-1; expected cards of its own for such an engine",
    ),
    (
        {
            "cluster": {"hosts": TWO},
            "actors": {
                "rollout": vllm(4, ["cuda:0"], hosts=["n1"]),
                "teacher": {"devices": ["cuda:3"], "hosts": ["n1"]},
            },
        },
        "cuda:3 of 'n1' is given to rollout-0, an engine over cuda:0 to cuda:3 "
        "(tensor_parallel_size 4), and to teacher-0; expected cards of its own for such an engine",
    ),
    (
        {
            "cluster": {"hosts": TWO},
            "actors": {"rollout": {"hosts": ["n1"]}},
            "transport": {"kind": "ipc"},
        },
        "transport.kind is 'ipc', but processes run on 2 hosts; expected tcp or null",
    ),
    (
        {"transport": {"bind": "10.0.0.1"}},
        "transport.bind is '10.0.0.1'; expected null, or kind tcp beside it",
    ),
    (
        {
            "cluster": {"hosts": TWO},
            "actors": {"rollout": {"hosts": ["n1"]}},
            "transport": {"bind": "127.0.0.1"},
        },
        "transport.bind is '127.0.0.1', so n1 cannot reach the controller; expected an address of "
        "the first host under which the other hosts reach it",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "node..1x"}}}},
        "cluster.hosts.n0.address is 'node..1x'; expected an IP address or the name of a host, "
        "without a port",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "n" * 64}}}},
        f"cluster.hosts.n0.address is '{'n' * 64}'; expected an IP address or the name of a host, "
        "without a port",
    ),
    ({"transport": {"port": 5}}, "transport.port is 5; expected null, or kind tcp beside it"),
    (
        {"transport": {"kind": "tcp", "bind": "tcp://x"}},
        "transport.bind is 'tcp://x'; expected an IP address or the name of a host, without a port",
    ),
    (
        {"transport": {"kind": "tcp", "port": 5000}, "cluster": {"port": 5000}},
        "transport.port and cluster.port are both 5000; expected a port of its own for each, or "
        "null",
    ),
    (
        {"actors": {"trainer": {"devices": ["cuda:0", "cuda:00"]}}},
        "actors.trainer.devices names 'cuda:00'; expected cpu, cuda or cuda:N",
    ),
    (
        {"actors": {"rollout": {"devices": ["cuda:٣"]}}},
        "actors.rollout.devices names 'cuda:٣'; expected cpu, cuda or cuda:N",
    ),
    (
        {"actors": {"rollout": {"devices": ["cuda:0", "cuda"]}}},
        "actors.rollout.devices names 'cuda:0' twice; expected each card once (count gives more "
        "processes, and devices are given out in turn)",
    ),
    (
        {"cluster": {"hosts": {"n0": {"address": "::0"}}}},
        "cluster.hosts.n0.address is '::0'; expected the address under which other hosts reach it",
    ),
    *(
        (
            {"actors": {"rollout": vllm(size, ["cuda:0"])}},
            f"actors.rollout.engine_args.tensor_parallel_size is {size!r}; expected a whole number "
            "from 1 to 1024",
        )
        for size in (0, True, 1.0, "2", 10**12)
    ),
]


@pytest.mark.parametrize(("sections", "sentence"), REFUSALS)
def test_what_cannot_be_laid_out(sections: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check(topology_of(**sections))
    assert str(caught.value) == sentence


UNBUILT = [
    (
        {"cluster": {"launcher": "render"}},
        "cluster.launcher is 'render'; expected zppo render, which writes the job that launches "
        "the run, or cluster.launcher local",
    ),
]


@pytest.mark.parametrize(("sections", "sentence"), UNBUILT)
def test_what_is_planned_but_not_started(sections: dict[str, object], sentence: str) -> None:
    topology = topology_of(**sections)
    check(topology)
    with pytest.raises(UserError) as caught:
        refuse_unbuilt(topology)
    assert str(caught.value) == sentence


def test_mistakes_in_a_host_name_it() -> None:
    """Messages of msgspec do not say which value of a mapping they mean."""
    for hosts, sentence in (
        ({"a": {}, "b.c": {"adress": "x"}}, "there is no setting cluster.hosts.b.c.adress (did you mean 'address'?)"),
        ({"a": {"cards": -1}}, "cluster.hosts.a.cards is -1; expected a whole number of at least 0 and at most 1024, or null"),
        ({"a": {}, "b": None}, "cluster.hosts.b is null; expected a section of settings"),
        ({"a": {"cards": 10**6}}, "cluster.hosts.a.cards is 1000000; expected a whole number of at least 0 and at most 1024, or null"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            topology_of(cluster={"hosts": hosts})
        assert str(caught.value) == f"t.yaml: {sentence}"


def test_a_host_of_which_nothing_is_said_gives_the_cards_that_are_named() -> None:
    """A process that names cuda:3 alone needs four cards: the first ones have other numbers."""
    actors = {
        "rollout": {"hosts": ["n1"], "devices": ["cuda:3"]},
        "teacher": vllm(2, ["cuda:0"], hosts=["n0"]),
    }
    topology = topology_of(cluster={"hosts": TWO}, actors=actors)
    assert [cards_of(topology, host) for host in BOTH] == [2, 4]
    said = {**TWO, "n1": {**TWO["n1"], "cards": 8, "card_gib": 80}}
    topology = topology_of(cluster={"hosts": said}, actors=actors)
    assert [cards_of(topology, host) for host in BOTH] == [2, 8]
    assert cards_of(topology_of(cluster={"hosts": TWO}), "n1") == 0


@pytest.mark.parametrize("setting", ["transport.port", "cluster.port", "actors.trainer.port"])
def test_a_port_has_sixteen_bits(setting: str) -> None:
    sections: dict[str, object] = {"port": 70_000}
    for name in reversed(setting.split(".")[:-1]):
        sections = {name: sections}
    with pytest.raises(UserError) as caught:
        topology_of(**sections)
    assert str(caught.value) == (
        f"t.yaml: {setting} is 70000; expected a whole number of at least 1 and at most 65535, or "
        "null"
    )


@pytest.mark.parametrize(("pool", "least"), [("rollout", 0), ("teacher", 0), ("grader", 1)])
def test_a_plan_lists_no_millions_of_processes(pool: str, least: int) -> None:
    with pytest.raises(UserError) as caught:
        topology_of(actors={pool: {"count": 10**7}})
    assert str(caught.value) == (
        f"t.yaml: actors.{pool}.count is 10000000; expected a whole number of at least {least} and "
        "at most 10000"
    )


def test_a_run_that_a_job_launches_is_shown_but_not_started(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zppo.launch import main

    monkeypatch.chdir(small)
    hosts = "cluster.hosts={n0: {address: 10.0.0.1}, n1: {address: 10.0.0.2}}"
    command = ["topology.yaml", "--set", hosts, "--set", "actors.rollout.hosts=[n1]"]
    command += ["--set", "cluster.launcher=render"]
    assert main([*command, "--dry-run"]) == 0
    before = sorted(small.rglob("*"))
    assert main(command) == 2
    assert UNBUILT[0][1] in capsys.readouterr().err
    assert sorted(small.rglob("*")) == before
