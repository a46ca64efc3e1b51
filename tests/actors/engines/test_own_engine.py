"""An engine of the user's own: what it is given, and what is refused when it is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from zppo.config.served import ServedModel, served_student
from zppo.config.topology import ActorConfig, ActorsConfig, DataConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo_actors.engines import EngineSpec, create
from zppo_actors.sampler.actor import check_capacity

MINE = """
from msgspec.structs import replace
from zppo_actors.engines import create

def small(spec):
    actor = replace(spec.served.actor, engine="simulated", engine_args={"max_sequences": 4})
    engine = create(replace(spec, served=replace(spec.served, actor=actor)))
    engine.given = (spec.device, spec.served.actor.engine_args)
    return engine

def none(spec):
    return object()
"""


def topology_with(folder: Path, name: str) -> Topology:
    (folder / "mine.py").write_text(MINE)
    actor = ActorConfig(engine=f"{folder}/mine.py:{name}", engine_args={"any": [1, 2]})
    return Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        actors=ActorsConfig(rollout=actor),
    )


def spec_of(topology: Topology) -> EngineSpec:
    served: ServedModel = served_student(topology)
    return EngineSpec(served=served, device="cuda:1")


def test_it_gets_its_device_and_arguments_unread(tmp_path: Path) -> None:
    engine = create(spec_of(topology_with(tmp_path, "small")))
    assert engine.given == ("cuda:1", {"any": [1, 2]})  # type: ignore[attr-defined]
    assert engine.capacity == 4


def test_what_is_no_engine_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        create(spec_of(topology_with(tmp_path, "none")))
    assert str(caught.value) == (
        f"actors.rollout.engine: '{tmp_path}/mine.py:none' built an object of type object without "
        "'capacity'; expected an engine (zppo_actors/engines/base.py)"
    )


def test_a_group_must_fit_into_it(tmp_path: Path) -> None:
    topology = topology_with(tmp_path, "small")
    served = served_student(topology)
    check_capacity(8, served, topology)
    with pytest.raises(UserError) as caught:
        check_capacity(4, served, topology)
    assert str(caught.value) == (
        f"actors.rollout.engine: '{tmp_path}/mine.py:small' takes 4 sequences at once; expected at "
        "least 8, the method.group_size, because a group is sampled as a whole"
    )
    held = replace(
        topology,
        data=replace(topology.data, heldout="h"),
        evaluation=replace(topology.evaluation, samples=16),
    )
    with pytest.raises(UserError, match="at least 16, the evaluation"):
        check_capacity(8, served, held)
