"""Puts a search over one setting into `docs/results.md`: what each method reaches with each value,
between two marks.

    python -m zppo.compare … --set optimizer.learning_rate=1.0e-4 --out runs/search-1e-4
    python -m zppo.compare … --set optimizer.learning_rate=3.0e-4 --out runs/search-3e-4
    python tools/search_page.py --comparisons runs/search-1e-4 runs/search-3e-4 --section search
        [--curves] [--page docs/results.md]

`--curves` shows every held-out evaluation on the way, in place of the last alone. Every folder is a
comparison of the same methods under the same topology but for one setting, and the tool refuses
anything else: no method is searched with more values, more seeds or longer runs than another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).resolve().parent))

from results_page import PAGE, replace_section

from zppo.comparison.record import Record, read_record
from zppo.comparison.report import command, markdown_table
from zppo.comparison.results import MethodResult, Results, load_results
from zppo.comparison.statistics import student_half_width
from zppo.comparison.tables import Table
from zppo.errors import Parser, UserError, run_command
from zppo.report.figures import percent

MISSING = "(not there)"


class Search(Struct, frozen=True):
    """Comparisons that differ in `setting` alone, in the order of its `values`; `seeds` are those
    that every method has finished with every value, `steps` how far all of them came."""

    setting: str
    values: list[Any]
    comparisons: list[Results]
    seeds: list[int]
    steps: int


def load(folders: Sequence[Path]) -> Search:
    """Read the comparisons. Raises UserError unless they are one search."""
    records = [read_record(folder) for folder in folders]
    setting = _searched(records)
    order = sorted(
        range(len(records)),
        key=lambda index: _sort_key(_flat(records[index]).get(setting, MISSING)),
    )
    worlds = [load_results(folders[index], records[index]) for index in order]
    steps = [world.step for world in worlds if world.step is not None]
    if len(steps) < len(worlds):
        raise UserError("--comparisons: one holds no finished run; expected finished ones")
    if len(set(steps)) > 1:
        raise UserError(
            f"--comparisons: the runs end after {', '.join(map(str, steps))} steps; expected "
            "equally many"
        )
    values = [_flat(world.record).get(setting, MISSING) for world in worlds]
    return Search(setting, values, worlds, _shared_seeds(worlds), steps[0])


def table(search: Search) -> Table:
    """Mean held-out accuracy over the shared seeds, by method and value; the best of a row is
    bold."""
    header = [
        "method",
        *(f"{value:g}" if isinstance(value, float) else str(value) for value in search.values),
    ]
    rows = []
    for method in search.comparisons[0].methods:
        means = [_mean(search, world, method.name) for world in search.comparisons]
        cells = [f"**{percent(mean)}**" if mean == max(means) else percent(mean) for mean in means]
        rows.append([method.title, *cells])
    return Table(
        f"Held-out accuracy after {search.steps} steps by `{search.setting}`", header, rows
    )


def curves(search: Search, method: str) -> Table:
    """Held-out accuracy of one method at each evaluation, by value: mean and half the 95 % interval
    of Student over the shared seeds; of two values also their difference, paired by seed."""
    names = [str(value) for value in search.values]
    points_VSE = [_evaluations(search, world, method) for world in search.comparisons]
    steps = sorted(set.intersection(*(set(seed) for value in points_VSE for seed in value)))
    rows = []
    for step in steps:
        values = [[seed[step] for seed in value] for value in points_VSE]
        cells = [f"{100 * np.mean(seeds):.1f} %{_half_width(seeds)}" for seeds in values]
        if len(values) == 2:
            apart = [a - b for a, b in zip(*values, strict=True)]
            cells.append(f"{100 * np.mean(apart):+.1f}{_half_width(apart)}")
        rows.append([f"{step:g}", *cells])
    difference = [f"{names[0]} − {names[1]}, points"] if len(names) == 2 else []
    title = f"Held-out accuracy of {method} by `{search.setting}`"
    return Table(title, ["after steps", *names, *difference], rows)


def section(search: Search, on_the_way: bool = False) -> str:
    """What stands between the marks."""
    seeds = ", ".join(map(str, search.seeds))
    commands = "\n".join(command(world) for world in search.comparisons)
    shown = [table(search)]
    if on_the_way:
        shown = [curves(search, method.name) for method in search.comparisons[0].methods]
    said = (
        f"Every method with every value of `{search.setting}`, "
        f"seed{'s' if len(search.seeds) > 1 else ''} {seeds}, every other setting shared; "
        + ("± is half the 95 % interval." if on_the_way else "the best of a row is bold.")
    )
    tables = "\n\n".join(markdown_table(one) for one in shown)
    title = shown[0].title
    return f"### {title}\n\n```\n{commands}\n```\n\n{said}\n\n{tables}"


def _searched(records: Sequence[Record]) -> str:
    """The one setting in which the topologies differ."""
    if len(records) < 2:
        raise UserError("--comparisons: one folder is no search; expected two or more")
    first, *others = records
    for other in others:
        if other.corpus != first.corpus:
            raise UserError(
                "--comparisons: the folders are about other questions; expected the same data.train"
            )
        if set(other.methods) != set(first.methods):
            missing = ", ".join(sorted(set(other.methods) ^ set(first.methods)))
            raise UserError(
                f"--comparisons: not every folder has {missing}; expected the same methods in all"
            )
    flat = [_flat(record) for record in records]
    every = dict.fromkeys(name for one in flat for name in one)
    names = [name for name in every if len({_key(one.get(name, MISSING)) for one in flat}) > 1]
    if len(names) != 1 or len({_key(one.get(names[0], MISSING)) for one in flat}) < len(flat):
        found = ", ".join(names) or "nothing"
        raise UserError(
            f"--comparisons: the folders differ in {found}; expected one setting, and each value "
            "once"
        )
    return names[0]


def _flat(record: Record) -> dict[str, Any]:
    """Every setting by its path, e.g. `optimizer.learning_rate`."""
    found: dict[str, Any] = {}

    def add(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                add(inner, f"{path}.{name}" if path else name)
        else:
            found[path] = value

    add(msgspec.to_builtins(record.topology), "")
    return found


def _key(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _sort_key(value: Any) -> tuple[bool, Any]:
    number = isinstance(value, int | float)
    return (not number, value if number else str(value))


def _finished_seeds(method: MethodResult) -> set[int]:
    return {run.seed for run in method.finished}


def _shared_seeds(worlds: Sequence[Results]) -> list[int]:
    sets = [_finished_seeds(method) for world in worlds for method in world.methods]
    seeds = sorted(set.intersection(*sets))
    if not seeds:
        raise UserError(
            "--comparisons: no seed is finished for every method with every value; finish one first"
        )
    return seeds


def _mean(search: Search, world: Results, name: str) -> float:
    method = next(method for method in world.methods if method.name == name)
    values = [run.accuracy_at(search.steps) for run in method.finished if run.seed in search.seeds]
    return float(np.mean([value for value in values if value is not None]))


def _evaluations(search: Search, world: Results, name: str) -> list[dict[float, float]]:
    """Accuracy by step of each shared seed."""
    method = next(method for method in world.methods if method.name == name)
    by_seed = {run.seed: run.evaluations() for run in method.finished}
    return [dict(zip(*map(list, by_seed[seed]), strict=True)) for seed in search.seeds]


def _half_width(values: Sequence[float]) -> str:
    half = student_half_width(values)
    return "" if half is None else f" ± {100 * half:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--comparisons", type=Path, nargs="+", required=True, help="folders, one for each value"
    )
    parser.add_argument("--section", required=True, help="name in the marks of the page")
    parser.add_argument("--curves", action="store_true", help="every evaluation on the way")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        if not options.page.is_file():
            raise UserError(f"--page: there is no file {options.page}")
        text = section(load(options.comparisons), options.curves)
        options.page.write_text(
            replace_section(options.page.read_text("utf-8"), options.section, text), "utf-8"
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
