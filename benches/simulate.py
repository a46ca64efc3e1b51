"""What a setting would take, by the bound on staleness: the real scheduler under a virtual clock.

    python -P benches/simulate.py [benches/setting_p.yaml benches/setting_n.yaml]
        [--bounds 0,1,2,4,8,16] [--steps 40] [--seeds 2] [--small]

Each row is a mean over seeds, each run's warm-up left out. *Over the bound* is the time of a step
over the time that it would take if the busiest machines were always busy at their best batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import msgspec
from msgspec import structs

from zppo.config.strict_yaml import parse
from zppo.simulation import Outcome, World, simulate

HERE = Path(__file__).parent
SETTINGS = [HERE / "setting_p.yaml", HERE / "setting_n.yaml"]
HEADER = (
    "| bound | s/step | work bound | over it | range | bottleneck | trainer waits | staleness "
    "mean / max | lead at the end |\n|---:|---:|---:|---:|---|---|---:|---|---:|"
)


def read_world(path: Path) -> World:
    """The setting in a file. Raises UserError for what is no YAML, msgspec.ValidationError."""
    return msgspec.convert(parse(path.read_text(encoding="utf-8"), str(path)).data, World)


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


def table(world: World, bounds: Sequence[int], steps: int, seeds: int) -> Iterator[str]:
    yield HEADER
    for bound in bounds:
        runs = [simulate(world.with_bound(bound), steps, seed) for seed in range(seeds)]
        yield row(bound, runs)


def row(bound: int, runs: list[Outcome]) -> str:
    ratios = [run.over_bound for run in runs]
    cells = [
        str(bound),
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", type=Path, default=SETTINGS)
    parser.add_argument("--bounds", default="0,1,2,4,8,16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a sixteenth of each setting")
    options = parser.parse_args(arguments)
    bounds = [int(bound) for bound in options.bounds.split(",")]
    for path in options.settings:
        world = read_world(path)
        print(f"\n### {path.stem}\n")
        for line in table(
            small(world) if options.small else world, bounds, options.steps, options.seeds
        ):
            print(line, flush=True)


if __name__ == "__main__":
    main()
