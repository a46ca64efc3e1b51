"""What a setting would take, by the bound on staleness: the real scheduler under a virtual clock.

    python -P benches/simulate.py [benches/setting_p.yaml benches/setting_n.yaml]
        [--bounds 0,1,2,4,8,16] [--steps 40] [--seeds 2] [--batches windows,filled] [--by-step]
        [--small | --share 0.25]

Each row is a mean over seeds, each run's warm-up left out. *Over the bound* is the time of a step
over the time that it would take if the busiest machines were always busy at their best batch. At
bound 0 steps train windows, whatever is asked for. With both kinds of batches a second table has
what filled ones gain, and what they train more or less of, filled minus windows. `--by-step` shows
what each step trained, so that a bias of filled batches to short or easy questions would be seen.
The last line says how many events the scheduler handled in a second of processor time, engines,
lengths and rewards of the simulation included.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

import msgspec
from msgspec import structs

from zppo.config.options import counting, positive, several, share
from zppo.config.strict_yaml import parse
from zppo.config.topology import Batches
from zppo.errors import Parser, UserError, nearest, run_command
from zppo.simulation import Engines, Outcome, World, simulate

HERE = Path(__file__).parent
SETTINGS = [HERE / "setting_p.yaml", HERE / "setting_n.yaml"]
HEADER = (
    "| bound | batches | s/step | work bound | over it | range | bottleneck | trainer waits "
    "| staleness mean / max | lead at the end |\n|---:|---|---:|---:|---:|---|---|---:|---|---:|"
)
COMPARED = (
    "| bound | gain of filled batches (of the seeds) | tokens a plain response | skill "
    "| tokens a step, % |\n|---:|---|---|---|---|"
)
BY_STEP = (
    "| step | batches | groups | tokens | tokens a plain response | skill |\n"
    "|---:|---|---:|---:|---:|---:|"
)


def read_world(path: Path) -> World:
    """The setting in a file. Raises UserError."""
    try:
        return msgspec.convert(parse(path.read_text(encoding="utf-8"), str(path)).data, World)
    except (UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}; expected a setting as in {SETTINGS[0]}") from None


def small(world: World) -> World:
    """The same machines with a sixteenth of the questions and of the slots."""
    topology, speeds = world.topology, world.speeds
    scheduler = structs.replace(topology.scheduler, new_questions=24)
    return structs.replace(
        world,
        topology=structs.replace(topology, scheduler=scheduler),
        speeds=structs.replace(
            speeds,
            rollout=structs.replace(speeds.rollout, slots=16),
            teachers=tuple(structs.replace(engines, slots=8) for engines in speeds.teachers),
        ),
    )


def part(world: World, kept: float) -> World:
    """So many of the questions and slots, on machines that are slower by as much, so that a step
    takes as long; fewer questions make chance weigh more. Raises UserError for a share that leaves
    no question, or an engine without room for a group."""
    topology, speeds = world.topology, world.speeds
    least = max(
        1 / topology.scheduler.new_questions,
        topology.method.group_size / speeds.rollout.slots,
        *(topology.method.teacher_group_size / engines.slots for engines in speeds.teachers),
    )
    if kept < least:
        raise UserError(
            f"--share is {kept:g}; expected at least {least:g}, because a step has a question and "
            "an engine samples a group as a whole"
        )

    def fewer(engines: Engines) -> Engines:
        curve = structs.replace(engines.curve, per_sequence=engines.curve.per_sequence / kept)
        return structs.replace(engines, slots=round(engines.slots * kept), curve=curve)

    new = round(topology.scheduler.new_questions * kept)
    scheduler = structs.replace(topology.scheduler, new_questions=new)
    rate = speeds.trainer.tokens_per_second * kept
    return structs.replace(
        world,
        topology=structs.replace(topology, scheduler=scheduler),
        speeds=structs.replace(
            speeds,
            rollout=fewer(speeds.rollout),
            teachers=tuple(fewer(engines) for engines in speeds.teachers),
            trainer=structs.replace(speeds.trainer, tokens_per_second=rate),
        ),
    )


def filled_by(world: World, batches: Batches) -> World:
    """The same with steps that train windows, or what has finished."""
    scheduler = structs.replace(world.topology.scheduler, batches=batches)
    return structs.replace(world, topology=structs.replace(world.topology, scheduler=scheduler))


def runs_of(
    world: World, bounds: Sequence[int], kinds: Sequence[Batches], steps: int, seeds: int
) -> Iterator[tuple[int, Batches, list[Outcome]]]:
    """The runs of each row, one a seed."""
    for bound in bounds:
        for batches in kinds:
            one = filled_by(world, batches).with_bound(bound)
            yield bound, batches, [simulate(one, steps, seed) for seed in range(seeds)]


def compared(bound: int, windows: Sequence[Outcome], filled: Sequence[Outcome]) -> str:
    """What filled batches gain, by seed, and how what they train differs: per step and seed."""
    pairs = list(zip(windows, filled, strict=True))
    gains = [one.seconds_per_step / other.seconds_per_step for one, other in pairs]
    steps = [
        both for one, other in pairs for both in zip(one.measured, other.measured, strict=True)
    ]
    differences = [
        interval([other.mean_length_plain - one.mean_length_plain for one, other in steps], 0),
        interval([other.skill - one.skill for one, other in steps], 3),
        interval([100 * (other.tokens / one.tokens - 1) for one, other in steps], 1),
    ]
    gain = f"{mean(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
    return f"| {' | '.join([str(bound), gain, *differences])} |"


def interval(values: Sequence[float], digits: int) -> str:
    """Mean and half of its 95 % interval, which a single value has none of."""
    if len(values) < 2:
        return f"{mean(values):+.{digits}f}"
    half = 1.96 * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.{digits}f} ± {half:.{digits}f}"


def by_step(batches: Batches, runs: list[Outcome]) -> Iterator[str]:
    for steps in zip(*(run.steps for run in runs), strict=True):
        cells = [
            str(steps[0].step),
            batches,
            f"{mean(sum(step.groups.values()) for step in steps):.0f}",
            f"{mean(step.tokens for step in steps):.3g}",
            f"{mean(step.mean_length_plain for step in steps):.0f}",
            f"{mean(step.skill for step in steps):.3f}",
        ]
        yield f"| {' | '.join(cells)} |"


def row(bound: int, batches: Batches, runs: list[Outcome]) -> str:
    ratios = [run.over_bound for run in runs]
    cells = [
        str(bound),
        batches,
        f"{mean(run.seconds_per_step for run in runs):.1f}",
        f"{mean(run.work_bound for run in runs):.1f}",
        f"{mean(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        runs[0].bottleneck,
        f"{mean(run.trainer_wait for run in runs):.0%}",
        f"{mean(run.staleness_mean for run in runs):.2f} / {max(r.staleness_max for r in runs)}",
        f"{mean(run.steps[-1].lead for run in runs):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def batches_of(text: str) -> Batches:
    """The type of an option that is a kind of batches."""
    kinds: tuple[Batches, ...] = get_args(Batches)
    for kind in kinds:
        if kind == text:
            return kind
    raise ArgumentTypeError(f"there are no batches {text!r}{nearest(text, kinds)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", type=Path, default=SETTINGS)
    parser.add_argument("--bounds", type=several(counting), default="0,1,2,4,8,16")
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--seeds", type=positive, default=2)
    parser.add_argument(
        "--batches", type=several(batches_of), default="windows", help="windows, filled or both"
    )
    parser.add_argument("--by-step", action="store_true", help="what each step trained, too")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a sixteenth of each setting")
    size.add_argument("--share", type=share, help="this share of the questions and slots")
    options = parser.parse_args(arguments)
    for path in options.settings:
        world = read_world(path)
        if options.small:
            world = small(world)
        elif options.share is not None:
            world = part(world, options.share)
        print(f"\n### {path.stem}\n\n{HEADER}")
        runs: dict[tuple[int, Batches], list[Outcome]] = {}
        begin = time.process_time()
        for bound, batches, found in runs_of(
            world, options.bounds, options.batches, options.steps, options.seeds
        ):
            print(row(bound, batches, found), flush=True)
            runs[bound, batches] = found
        if {"windows", "filled"} <= set(options.batches):
            print(f"\n{COMPARED}")
            for bound in filter(None, options.bounds):
                print(compared(bound, runs[bound, "windows"], runs[bound, "filled"]), flush=True)
        for (_, batches), found in runs.items() if options.by_step else ():
            print("", BY_STEP, *by_step(batches, found), sep="\n", flush=True)
        seconds = time.process_time() - begin
        events = sum(run.events for found in runs.values() for run in found)
        print(f"\n{events:,} events, {events / seconds:,.0f} a second of processor time")


if __name__ == "__main__":
    sys.exit(run_command(main))
