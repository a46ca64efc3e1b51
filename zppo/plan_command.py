"""`zppo plan`: what a run would do and, on machines whose speeds are known, how long it takes and
what would be faster.

The first part is the plan of `--dry-run`, by the same renderer. The second part is simulated: the
real scheduler under a virtual clock (zppo.simulation). No speed is guessed: it is read from a file,
off a recorded run, or measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import msgspec
from msgspec import Struct
from rich.console import Console

from zppo import launch
from zppo.capacity.answer import Replay, Times, answer_of, times_of
from zppo.capacity.calibration_file import check_writable, read_calibration, write_calibration
from zppo.capacity.measuring import measured
from zppo.capacity.recorded import Recorded, read_recorded
from zppo.capacity.search import MOST_STEPS, Search, search
from zppo.capacity.settings import check_settings
from zppo.capacity.view import show_times
from zppo.config.load import load, run_folder
from zppo.config.options import seconds
from zppo.config.topology import Topology
from zppo.config.typed import setting_typed
from zppo.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Parser, UserError, run_command
from zppo.plan.machine import measure_machine, wants_gpu
from zppo.plan.machines_file import Described
from zppo.plan.make import make_plan
from zppo.plan.plan import Plan
from zppo.plan.processes import cores
from zppo.records import run_directory
from zppo.simulation import Calibration, World, simulate

WITHOUT = (
    "how long a step takes is not said without measured speeds: --from-run RUN, --calibrate or "
    "--calibration FILE"
)
REPLAYS = 3
SEARCH_SECONDS = 60.0
CALIBRATE_SECONDS = 120.0


class Planned(Struct, frozen=True):
    """A plan, what its corpus has, and how a variant of it is planned for the same machines."""

    plan: Plan
    questions: int
    heldout: int
    variant: Callable[[Topology], Plan]


class Source(Struct, frozen=True):
    """Where speeds are from: `name` is said in messages."""

    name: str
    calibration: Calibration
    recorded: Recorded | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Show the plan. Returns 0, 2 after a user error, or 130 when interrupted."""
    try:
        return _plan(_parser().parse_args(argv))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("zppo plan: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _plan(asked: argparse.Namespace) -> int:
    _check_options(asked)
    topology = load(asked.file, asked.set)
    # What was recorded or written by hand is read before the plan is made, which may take long.
    source = _read_source(asked)
    planned = _planned(topology, asked)
    if asked.calibrate:
        source = _measure(planned, asked.within or CALIBRATE_SECONDS)
    world = _world(planned, source) if source is not None else None
    if source is not None and asked.write is not None:
        write_calibration(asked.write, source.calibration, source.name)
    offline = asked.offline or asked.machines is not None
    directory, console = run_folder(topology), Console()
    if asked.json and not offline:
        launch.ask_servers(planned.plan)
    if not asked.json:
        launch.show_plan(planned.plan, directory, offline)
    times = None
    if source is not None and world is not None:
        times = _times(planned, world, source, asked.seconds or SEARCH_SECONDS)
    if asked.json:
        answer = answer_of(planned.plan, str(directory), times)
        print(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    elif times is not None:
        show_times(times, console)
    else:
        console.print(f"note: {WITHOUT}", markup=False, highlight=False)
    return 0


def _planned(topology: Topology, asked: argparse.Namespace) -> Planned:
    if asked.machines is not None:
        described = Described.of(topology, asked.machines, asked.file.parent)
        machines = described.machines
        return Planned(described.plan(), machines.questions, machines.heldout, described.plan)
    checked = launch.check(topology)
    questions = len(checked.corpus.questions)

    def variant(changed: Topology) -> Plan:
        base, directory = run_directory.runtime_base(), run_folder(changed)
        machine = measure_machine(cores(), base, directory, wants_gpu(changed))
        return make_plan(changed, questions, machine)

    return Planned(checked.plan, questions, len(checked.heldout), variant)


# ---- speeds --------------------------------------------------------------------------------------


def _check_options(asked: argparse.Namespace) -> None:
    given = [
        option
        for option, value in (
            ("--calibration", asked.calibration),
            ("--from-run", asked.from_run),
            ("--calibrate", asked.calibrate),
        )
        if value
    ]
    if len(given) > 1:
        raise UserError(f"zppo plan: {' and '.join(given)} are given; expected one of them")
    if asked.machines is not None and asked.calibrate:
        raise UserError(
            "--calibrate: measures this machine, and --machines describes others; expected "
            "--calibration FILE or --from-run RUN with --machines"
        )
    if asked.within is not None and not asked.calibrate:
        raise UserError("--within: limits --calibrate, which is not given; leave it out")
    if asked.seconds is not None and not given:
        raise UserError(f"--seconds: there is nothing to search with; {WITHOUT}")
    if asked.write is not None:
        if given not in (["--from-run"], ["--calibrate"]):
            raise UserError(
                "--write: there is nothing to write; expected --from-run RUN or --calibrate with it"
            )
        check_writable(asked.write)


def _read_source(asked: argparse.Namespace) -> Source | None:
    if asked.calibration is not None:
        return Source(f"--calibration {asked.calibration}", read_calibration(asked.calibration))
    if asked.from_run is not None:
        recorded = read_recorded(asked.from_run)
        return Source(f"--from-run {asked.from_run}", recorded.calibration, recorded)
    return None


def _measure(planned: Planned, within: float) -> Source:
    found = measured(planned.plan, within)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return Source("--calibrate, measured here", found.calibration)


def _world(planned: Planned, source: Source) -> World:
    """The planned run on the measured machines. Raises UserError if they are not those of the
    topology, or a group finds no room in an engine."""
    topology = planned.plan.topology
    check_settings(source.calibration.settings, topology, source.name)
    world = _world_of(topology, source.calibration, planned)
    try:
        world.check()
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    return world


def _world_of(topology: Topology, calibration: Calibration, planned: Planned) -> World:
    questions, heldout = planned.questions, planned.heldout
    limit = topology.evaluation.limit
    asked = heldout if limit is None else min(limit, heldout)
    return World.of(topology, calibration, corpus=questions, heldout=asked)


# ---- times ---------------------------------------------------------------------------------------


def _times(planned: Planned, world: World, source: Source, limit: float) -> Times:
    plan = planned.plan

    def fits(topology: Topology) -> bool:
        try:
            return bool(planned.variant(topology))
        except UserError:
            return False

    most = max(1, min(plan.windows.steps, MOST_STEPS))
    found: Search = search(world, most, limit, time.monotonic, fits)
    best = plan if found.best is found.given else planned.variant(found.best.topology)
    replay = _replay(source.recorded, planned) if source.recorded is not None else None
    return times_of(found, (plan, best), source.name, replay)


def _replay(recorded: Recorded, planned: Planned) -> Replay:
    """The recorded run in simulation, with the topology that it had: the mean over some seeds,
    because a short run is a draw."""
    world = _world_of(recorded.topology, recorded.calibration, planned)
    runs = [
        simulate(world, recorded.steps, seed, recorded.warm).seconds_per_step
        for seed in range(REPLAYS)
    ]
    return Replay(
        recorded=recorded.seconds_per_step,
        simulated=fmean(runs),
        first_step=recorded.warm,
        last_step=recorded.steps - 1,
    )


# ---- options -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo plan", description="What a run would do and take.", settings=setting_typed
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the run, in YAML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change one setting"
    )
    parser.add_argument(
        "--from-run", type=Path, metavar="RUN", help="read the speeds off a recorded run"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure the speeds here and now")
    parser.add_argument(
        "--within",
        type=seconds,
        metavar="SECONDS",
        help=f"the most that --calibrate takes, loading included ({CALIBRATE_SECONDS:g})",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="speeds written by hand or by --write"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the speeds to a file for --calibration"
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        metavar="SECONDS",
        help=f"the most that the search for a faster split takes ({SEARCH_SECONDS:g})",
    )
    parser.add_argument(
        "--machines", type=Path, metavar="FILE", help="plan for what FILE describes, not for here"
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--offline", action="store_true", help="do not ask the teacher's server")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
