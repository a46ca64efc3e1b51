"""`zppo plan`: what a run would do and, on machines whose speeds are measured, how long it takes.

The first part is the plan of `--dry-run`, by the same renderer. The second part is simulated: the
real scheduler under a virtual clock (zppo.simulation). No speed is guessed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import field
from msgspec.structs import asdict
from rich.console import Console
from rich.table import Table

from zppo.config.base import Config, Positive
from zppo.config.load import load, run_folder
from zppo.config.strict_yaml import parse
from zppo.config.typed import setting_typed
from zppo.errors import EXIT_USER_ERROR, Parser, UserError
from zppo.launch import check, show_plan
from zppo.plan.plan import Plan
from zppo.simulation import Accuracies, Lengths, Outcome, Speeds, World, simulate

BOUNDS = (0, 1, 2, 4, 8)
"""Values of `scheduler.max_staleness` that are tried besides the topology's own."""
MOST_STEPS = 24
"""Steps simulated for each bound, where the run has as many."""
WITHOUT = "how long a step takes is not said without --calibration FILE, the measured speeds"


class Calibration(Config, frozen=True, kw_only=True):
    """What is measured of machines and questions: the fields of a World but for its topology."""

    speeds: Speeds
    lengths: Lengths
    lengths_of: dict[str, Lengths] = field(default_factory=dict)
    accuracies: Accuracies = Accuracies()
    prompt_tokens: Positive = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Show the plan. Returns 0, or 2 after a user error."""
    parser = Parser(
        prog="zppo plan", description="What a run would do and take.", settings=setting_typed
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the run, in YAML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change one setting"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="the measured speeds")
    parser.add_argument("--offline", action="store_true", help="do not ask the teacher's server")
    try:
        asked = parser.parse_args(argv)
        topology = load(asked.file, asked.set)
        measured = read_calibration(asked.calibration) if asked.calibration else None
        plan, console = check(topology).plan, Console()
        world = world_of(plan, measured, asked.calibration) if measured else None
        show_plan(plan, run_folder(topology), asked.offline)
        if world is None:
            console.print(f"note: {WITHOUT}", markup=False, highlight=False)
        else:
            show_times(plan, world, console)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def read_calibration(path: Path) -> Calibration:
    """The measured speeds in a YAML or JSON file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--calibration: cannot read {str(path)!r}: {reason}") from error
    try:
        return msgspec.convert(parse(text, str(path)).data, Calibration)
    except msgspec.ValidationError as error:
        raise UserError(f"--calibration: {str(path)!r} is not a calibration: {error}") from error


def world_of(plan: Plan, measured: Calibration, path: Path) -> World:
    """The planned run on the measured machines. Raises UserError if its teachers are not among
    them, or a group finds no room in an engine."""
    if plan.teacher_work and not measured.speeds.teachers:
        raise UserError(
            f"--calibration: {str(path)!r} has no speeds.teachers; expected those of the "
            "topology's teachers, because the method asks them"
        )
    method = plan.topology.method
    pools = [("rollout", measured.speeds.rollout, "group_size")]
    pools += [
        (f"teachers[{index}]", engines, "teacher_group_size")
        for index, engines in enumerate(measured.speeds.teachers if plan.teacher_work else ())
    ]
    for name, engines, setting in pools:
        size = getattr(method, setting)
        if engines.slots < size:
            raise UserError(
                f"--calibration: speeds.{name}.slots is {engines.slots} in {str(path)!r}; expected "
                f"at least {size}, method.{setting}, because an engine samples a group at once"
            )
    return World(topology=plan.topology, **asdict(measured))


def show_times(plan: Plan, world: World, console: Console) -> None:
    """Print what the run would take, at its own bound on staleness and at others."""
    own = plan.topology.scheduler.max_staleness
    steps = min(plan.windows.steps, MOST_STEPS)
    found = {n: simulate(world.with_bound(n), steps) for n in sorted({own, *BOUNDS})}
    console.print(f"expected, from {steps} simulated steps", highlight=False)
    table = Table()
    for name in ("max_staleness", "s/step", "hours", "bottleneck", "busy", "staleness"):
        table.add_column(name)
    for bound, outcome in found.items():
        table.add_row(*_row(bound, bound == own, outcome, plan.windows.steps))
    console.print(table)


def _row(bound: int, own: bool, outcome: Outcome, steps: int) -> list[str]:
    seconds = outcome.seconds_per_step
    return [
        f"{bound} (this run)" if own else str(bound),
        f"{seconds:.3g}",
        f"{steps * seconds / 3600:.3g}",
        outcome.bottleneck,
        ", ".join(f"{pool} {share:.0%}" for pool, share in outcome.busy.items()),
        f"{outcome.staleness_mean:.2f}, at most {outcome.staleness_max}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
