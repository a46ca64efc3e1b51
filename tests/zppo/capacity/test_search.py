"""The search for a faster split, where the best one can be said without it."""

from __future__ import annotations

from itertools import count

import pytest
from msgspec import structs
from worlds import topology

from zppo.capacity.search import search
from zppo.capacity.splits import changes, split_of, splits, with_split
from zppo.config.topology import Topology
from zppo.simulation import Accuracies, Curve, Engines, Lengths, Speeds, TrainerSpeed, World


def made(rollout: int, teacher: int, **actors: object) -> Topology:
    return topology(
        scheduler={"max_staleness": 1, "new_questions": 4},
        actors={
            "rollout": {"count": rollout, **actors},
            "teacher": {"count": teacher},
            "grader": {"count": 1},
        },
    )


def world(one: Topology, student_step: float, teacher_step: float) -> World:
    return World(
        topology=one,
        speeds=Speeds(
            rollout=Engines(slots=16, curve=Curve(fixed=student_step)),
            teachers=(Engines(slots=8, curve=Curve(fixed=teacher_step)),),
            trainer=TrainerSpeed(fixed=0.01, tokens_per_second=1e9),
        ),
        lengths=Lengths(values=(40,)),
        accuracies=Accuracies(values=(0.2,)),
    )


def clock_of(step: float):  # type: ignore[no-untyped-def]
    ticks = count()
    return lambda: next(ticks) * step


class Looks:
    """A clock on which a second passes with every look at it."""

    count = 0

    def __call__(self) -> float:
        self.count += 1
        return float(self.count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "speeds", "best"),
    [
        ((1, 4), (0.1, 0.001), {"rollout": 4, "teacher": 1}),
        ((4, 1), (0.001, 0.1), {"rollout": 1, "teacher": 4}),
    ],
)
def test_engines_go_where_the_work_is(
    given: tuple[int, int], speeds: tuple[float, float], best: dict[str, int]
) -> None:
    one = made(*given)
    found = search(world(one, *speeds), 6, 1e9, clock_of(0.0))
    assert split_of(found.best.topology) == best
    assert found.gain > 1.5 and not found.ended_early
    told = changes(one, found.best.topology)
    assert {f"actors.rollout.count={best['rollout']}"} <= set(told)
    assert [candidate.bound for candidate in found.bounds] == [0, 1, 2, 4, 8]


@pytest.mark.slow
def test_what_does_not_fit_is_not_the_best() -> None:
    one = made(1, 4)

    def fits(changed: Topology) -> bool:
        return changed.actors.rollout.count < 3 and changed.scheduler.max_staleness < 4

    found = search(world(one, 0.1, 0.001), 6, 1e9, clock_of(0.0), fits)
    assert split_of(found.best.topology) == {"rollout": 2, "teacher": 3}
    assert found.best.bound < 4


def test_when_its_time_is_over_the_given_plan_is_there_all_the_same() -> None:
    found = search(world(made(1, 4), 0.1, 0.001), 6, 1e-3, clock_of(1.0))
    assert found.ended_early and found.best is found.given
    assert [candidate.bound for candidate in found.bounds] == [1]


def test_time_that_other_splits_do_not_need_is_for_the_bounds_that_are_left() -> None:
    """Two engines, so there is no other split."""
    one, looks = made(1, 1), Looks()
    whole = search(world(one, 0.1, 0.001), 6, 1e9, looks)
    found = search(world(one, 0.1, 0.001), 6, 1.5 * looks.count, Looks())
    assert [candidate.bound for candidate in found.bounds] == [0, 1, 2, 4, 8]
    assert not found.ended_early and found.simulations == whole.simulations


def test_millions_of_splits_do_not_outlast_the_time() -> None:
    """More of them than could be looked at: each look at the clock is a second."""
    many = topology(
        scheduler={"max_staleness": 0, "new_questions": 4},
        actors={"rollout": {"count": 150}, "teacher": {"count": 1}, "grader": {"count": 1}},
        more_teachers=[{"model": f"t{i}", "actor": {"count": 1}} for i in range(4)],
    )
    looks = Looks()
    found = search(world(many, 0.001, 0.1), 1, 1000.0, looks)
    assert found.ended_early and looks.count < 1010


def test_splits_keep_every_process_on_its_device() -> None:
    cards = made(2, 2, devices=["cuda:0", "cuda:1"])
    devices = {"teacher": ["cuda:2", "cuda:3"]}
    cards = topology(
        actors={
            "rollout": {"count": 2, "devices": ["cuda:0", "cuda:1"]},
            "teacher": {"count": 2, **{"devices": devices["teacher"]}},
        }
    )
    found = list(splits(cards))
    assert found == [
        {"rollout": 1, "teacher": 3},
        {"rollout": 2, "teacher": 2},
        {"rollout": 3, "teacher": 1},
    ]
    assert found[1] == split_of(cards) and changes(cards, with_split(cards, found[1])) == []
    assert [split_of(with_split(cards, one)) for one in found] == found
    assert changes(cards, with_split(cards, found[2])) == [
        "actors.rollout.count=3",
        "actors.rollout.devices=[cuda:0, cuda:1, cuda:2]",
        "actors.teacher.count=1",
        "actors.teacher.devices=[cuda:3]",
    ]


def test_engines_that_take_turns_on_cards_name_each_once() -> None:
    shared = topology(
        actors={
            "rollout": {"count": 4, "devices": ["cuda:0", "cuda:1"]},
            "teacher": {"count": 1, "devices": ["cuda:2"]},
        }
    )
    given = split_of(shared)
    assert changes(shared, with_split(shared, given)) == []
    assert changes(shared, with_split(shared, {"rollout": 3, "teacher": 2})) == [
        "actors.rollout.count=3",
        "actors.teacher.count=2",
        "actors.teacher.devices=[cuda:1, cuda:2]",
    ]


def test_every_host_has_the_same_split() -> None:
    two = topology(
        cluster={"hosts": {"a": {"address": "h0"}, "b": {"address": "h1"}}},
        actors={
            "rollout": {"count": 4, "hosts": ["a", "b"], "devices": ["cuda:0", "cuda:1"]},
            "teacher": {"count": 2, "hosts": ["a", "b"], "devices": ["cuda:2"]},
        },
    )
    found = list(splits(two))
    assert found == [{"rollout": 2, "teacher": 4}, {"rollout": 4, "teacher": 2}]
    assert [split_of(with_split(two, one)) for one in found] == found
    assert changes(two, with_split(two, found[0])) == [
        "actors.rollout.count=2",
        "actors.rollout.devices=[cuda:0]",
        "actors.teacher.count=4",
        "actors.teacher.devices=[cuda:1, cuda:2]",
    ]
    actors = structs.replace(two.actors, teacher=structs.replace(two.actors.teacher, hosts=["a"]))
    apart = structs.replace(two, actors=actors)
    assert list(splits(apart)) == [{"rollout": 4, "teacher": 2}], "on other hosts"


def test_a_cpu_engine_does_not_do_the_work_of_a_card() -> None:
    mixed = made(2, 2, devices=["cuda:0", "cuda:1"])
    assert list(splits(mixed)) == [{"rollout": 2, "teacher": 2}]


def test_a_teacher_behind_a_server_has_no_share_of_the_machines() -> None:
    served = topology(
        teacher={"model": "big"},
        actors={
            "rollout": {"count": 3},
            "teacher": {"engine": "openai", "engine_args": {"base_url": "http://t/v1"}},
        },
    )
    assert list(splits(served)) == [{"rollout": 3}] == [split_of(served)]
