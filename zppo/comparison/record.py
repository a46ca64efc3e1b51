"""What a comparison is: a topology, methods, seeds, and the folder that holds their runs.

Invariant: all runs of a folder share every setting except the method, the seed and their place;
`comparison.json` keeps the shared topology, and a folder whose topology or questions differ is
refused. Methods and seeds may be added later. Everything that can be wrong is found by `check`
before the first run starts.

Layout of the folder: `comparison.json`, `runs/METHOD-seedN/` (ordinary run directories),
`logs/METHOD-seedN.log` (what each run printed), and what the report writes: `comparison.html`,
`results.md`, `*.csv`, `figures/*.png`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from zppo.algorithm.methods import get_method, method_names
from zppo.config.load import load
from zppo.config.topology import Topology
from zppo.errors import UserError, nearest
from zppo.plan.memory import inspect_models
from zppo.plan.processes import trainer_scores, uses_teacher
from zppo.records.atomic_file import written_whole
from zppo.records.flops import Sizes, multiplying

RECORD = "comparison.json"
OWN_SETTINGS = {
    "method.name": "--methods",
    "run.seed": "--seeds",
    "run.name": "the comparison",
    "run.directory": "--out",
}
"""Settings that differ between the runs of a comparison, and what gives them."""
MAX_SEEDS = 1000


class Pair(Struct, frozen=True, order=True):
    """One run of the comparison."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.method}-seed{self.seed}"

    def settings(self, out: Path) -> list[str]:
        """What `--set` gives it beyond the shared topology."""
        return [
            f"method.name={self.method}",
            f"run.seed={self.seed}",
            f"run.name={self.name}",
            f"run.directory={msgspec.json.encode(str(run_folder(out, self))).decode()}",
        ]


class Record(Struct, kw_only=True, forbid_unknown_fields=True):
    """Content of `comparison.json`. `source` and `overrides` are as the user gave them; `failures`
    holds the last words of runs that did not end well, by the name of the pair."""

    source: str
    overrides: list[str]
    topology: Topology
    corpus: str
    steps: int
    sizes: Sizes
    methods: list[str]
    seeds: list[int]
    baseline: str
    budget: str = "steps"
    failures: dict[str, str] = {}

    def pairs(self) -> Iterator[Pair]:
        """All runs, seed by seed, so that what is there after an interrupt can be compared."""
        return (Pair(method, seed) for seed in self.seeds for method in self.methods)


def run_folder(out: Path, pair: Pair) -> Path:
    return out / "runs" / pair.name


# ---- the command line ----------------------------------------------------------------------------


def parse_methods(text: str) -> list[str]:
    """`grpo,zppo` as a list. Raises UserError for none, an unknown one, or one named twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--methods names none; expected some of {', '.join(method_names())}")
    for name in names:
        if name not in method_names():
            raise UserError(
                f"--methods: there is no method {name!r}{nearest(name, method_names())}"
            )
    _refuse_twice("--methods", names)
    return names


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` or `0-7` or both, as a list. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,15})(?:\s*-\s*(\d{1,15}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MAX_SEEDS:
            raise UserError(
                f"--seeds is {text!r}; expected whole numbers with commas between, such as 0,1,2 "
                f"or 0-7, at most {MAX_SEEDS} of them"
            )
        seeds += range(first, last + 1)
    _refuse_twice("--seeds", [str(seed) for seed in seeds])
    return seeds


def parse_baseline(name: str, methods: Sequence[str]) -> str:
    """The method the others are compared with. Raises UserError if it is not one of them."""
    if name not in methods:
        raise UserError(
            f"--baseline is {name!r}; expected a method of the comparison{nearest(name, methods)}"
        )
    return name


def shared_topology(path: Path, overrides: Sequence[str]) -> Topology:
    """The topology without what differs between runs. Raises UserError."""
    for override in overrides:
        owner = OWN_SETTINGS.get(override.partition("=")[0])
        if owner is not None:
            raise UserError(
                f"--set {override}: this setting differs between the runs and is given by {owner}"
            )
    return neutral(load(path, overrides))


def neutral(topology: Topology) -> Topology:
    """The same topology with a fixed method, seed and place."""
    run = replace(topology.run, name="comparison", directory="", seed=0)
    return replace(topology, run=run, method=replace(topology.method, name=""))


def of_pair(topology: Topology, pair: Pair, out: Path) -> Topology:
    """The topology of one run, for checks before it is started."""
    run = replace(
        topology.run, name=pair.name, directory=str(run_folder(out, pair)), seed=pair.seed
    )
    return replace(topology, run=run, method=replace(topology.method, name=pair.method))


def sizes_of(topologies: Sequence[Topology]) -> Sizes:
    """Parameters of the models that runs of these topologies load; a teacher's only if there is a
    single one.

    Raises UserError for a folder that is no model.
    """
    asking = [
        topology
        for topology in topologies
        if uses_teacher(topology)
        or trainer_scores(get_method(topology.method.name), topology.teacher)
    ]
    models = inspect_models([*asking, *topologies][0])
    return Sizes(
        student=multiplying(models.student),
        teacher=multiplying(models.teacher)
        if models.teacher is not None and not topologies[0].more_teachers
        else None,
    )


def title(name: str) -> str:
    """How tables and figures call a method; the bare name for one that this version does not
    have."""
    return get_method(name).title if name in method_names() else name


# ---- the record ----------------------------------------------------------------------------------


def read_record(out: Path) -> Record:
    """Read `comparison.json`. Raises UserError if the folder holds no comparison."""
    path = out / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--out {str(out)!r}: holds no comparison (it has no {RECORD})") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not the record of a comparison: {error}") from None


def write_record(out: Path, record: Record) -> None:
    """Write it whole or not at all."""
    with written_whole(out / RECORD) as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def merge(old: Record, new: Record, out: Path) -> Record:
    """The record of a folder to which `new` is added. Raises UserError if it is another
    comparison."""
    difference = first_difference(
        msgspec.to_builtins(old.topology), msgspec.to_builtins(new.topology)
    )
    if difference is not None:
        setting, before, after = difference
        raise UserError(
            f"--out {str(out)!r}: holds another comparison, whose {setting} is {before!r} and not "
            f"{after!r}; name another folder, or give the old setting"
        )
    if old.corpus != new.corpus:
        raise UserError(
            f"--out {str(out)!r}: holds a comparison on other questions; data.train has changed "
            "since"
        )
    return replace(
        new,
        methods=[*old.methods, *(name for name in new.methods if name not in old.methods)],
        seeds=sorted({*old.seeds, *new.seeds}),
        sizes=replace(new.sizes, teacher=new.sizes.teacher or old.sizes.teacher),
        baseline=old.baseline,
        budget=old.budget,
        failures=old.failures,
    )


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two topologies differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            found = first_difference(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def _refuse_twice(option: str, values: Sequence[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option} names {value} twice; expected each once")
