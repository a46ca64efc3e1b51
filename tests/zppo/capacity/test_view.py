"""What a person reads of the times of a plan."""

from __future__ import annotations

import io

from msgspec import structs
from rich.console import Console

from zppo.capacity.answer import Best, Expected, Replay, Times
from zppo.capacity.view import show_times

GIVEN = Expected(
    max_staleness=2,
    engines={"rollout": 2, "teacher": 1},
    seconds_per_step=10.0,
    hours=1.0,
    bottleneck="rollout",
    busy={"rollout": 0.9},
    work={"rollout": 9.0},
    trainer_wait=0.5,
    staleness_mean=1.5,
    staleness_max=2,
    memory={"cuda:0": 2 << 30, "host": 3 << 30},
)
SPLIT = structs.replace(GIVEN, engines={"rollout": 1, "teacher": 2}, seconds_per_step=5.0)


def times(best: Expected, gain: float, *changes: str) -> Times:
    return Times(
        source="--from-run runs/a",
        replay=Replay(recorded=10.0, simulated=9.5, first_step=4, last_step=11),
        given=GIVEN,
        bounds=[structs.replace(GIVEN, max_staleness=1), GIVEN],
        best=Best(expected=best, gain=gain, changes=list(changes)),
        simulations=9,
        simulated_steps=8,
        ended_early=False,
    )


def shown(one: Times, width: int = 200) -> list[str]:
    out = io.StringIO()
    show_times(one, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_a_faster_split_has_a_row_its_memory_and_what_to_set() -> None:
    lines = shown(
        times(SPLIT, 2.0, "actors.rollout.count=1", "actors.teacher.devices=[cuda:0, cuda:1]",
              "more_teachers[0].actor.count=2")
    )  # fmt: skip
    assert lines[:2] == [
        "expected, from 8 simulated steps; speeds: --from-run runs/a",
        "replay of its run: 9.5 s a step, recorded 10 (-5%, steps 4 to 11)",
    ]
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == ["1", "2 (this run)", "2 (best found)", "cuda:0", "host"]
    assert next(line for line in lines if "cuda:0 │" in line).count("2.0 GiB at most") == 2
    assert lines[-1] == (
        "best found, 2.00 times the tokens of this run in the same time: --set "
        "actors.rollout.count=1 --set 'actors.teacher.devices=[cuda:0, cuda:1]' and, in the file, "
        "more_teachers[0].actor.count=2"
    )


def test_the_least_is_called_so() -> None:
    """A card with an engine of vLLM that takes what there is."""
    best = structs.replace(SPLIT, memory_least=["cuda:0"])
    lines = shown(times(best, 2.0, "actors.rollout.count=1"))
    table = lines[[line.strip() for line in lines].index("memory") : -1]
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in table if row[0] == "│"]
    assert cells == [
        ["cuda:0", "2.0 GiB at most", "2.0 GiB at least"],
        ["host", "3.0 GiB at most", "3.0 GiB at most"],
    ]


def test_a_bound_that_was_tried_is_marked_in_its_row() -> None:
    best = structs.replace(GIVEN, max_staleness=1)
    lines = shown(times(best, 0.98, "scheduler.max_staleness=1"))
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows[:2] == ["1 (best found)", "2 (this run)"]
    assert lines[-1] == (
        "best found, 0.98 times the tokens of this run in the same time, with less staleness: "
        "--set scheduler.max_staleness=1"
    )


def test_what_is_best_already_and_a_search_that_had_too_little_time() -> None:
    lines = shown(structs.replace(times(GIVEN, 1.0), ended_early=True))
    assert "best found" not in "".join(lines).replace("2 (this run) (best found)", "")
    assert lines[-2:] == [
        "nothing faster was found for these processes and bounds",
        "note: the search ended after 9 simulations, before all was tried; --seconds gives it more "
        "time",
    ]


def test_no_heading_is_cut_in_the_width_of_a_pipe() -> None:
    busy = {"rollout": 0.74, "teacher": 0.96, "grader": 0.19, "trainer": 0.77}
    lines = shown(times(structs.replace(GIVEN, busy=busy, seconds_per_step=1234.5), 1.0), 80)
    headings = ("bound", "engines", "s/step", "hours", "bottleneck", "busy", "staleness")
    [cells] = [line.strip("┃").split("┃") for line in lines if "bottleneck" in line]
    assert tuple(cell.strip() for cell in cells) == headings
    assert "…" not in "".join(lines)
