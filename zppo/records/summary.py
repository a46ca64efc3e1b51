"""The summary of a run as one flat dict with stable keys, computed from what the run directory
holds.

Nothing here is remembered by a process: the numbers come from `metrics.jsonl`, `fates.jsonl`,
`heldout.jsonl` and `journal.sqlite`, so a run that died can be summed up as well as one that ended.
`trained_twice` and `lost` are the exactly-once promise, counted independently of the scheduler that
keeps it (`zppo.records.ledger`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from zppo.errors import UserError
from zppo.records.ledger import read_ledger
from zppo.records.metrics import entry_name, failed_tries, reformulated_kinds

Record = dict[str, Any]


class Step(Struct):
    """What every line of `metrics.jsonl` has, besides its numbers."""

    step: Annotated[int, Meta(ge=0)]


class Fated(Step):
    """The same of `fates.jsonl`."""

    question_id: str
    fate: str
    entry_accuracy: float


class Evaluated(Step):
    """The same of `heldout.jsonl`."""

    accuracy: float


SHAPES: dict[str, tuple[type[Step], Any]] = {
    "metrics.jsonl": (Step, dict[str, float | int]),
    "fates.jsonl": (Fated, Record),
    "heldout.jsonl": (Evaluated, Record),
}
"""What a line must have and what it may hold, by file: these are read by people too, and edited."""


def read_lines(path: Path) -> list[Record]:
    """Records of a JSONL file of a run; an absent file has none, and a last line cut short by a
    crash is left out. Raises UserError for a line that no run has written."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # Only what a line feed ends was written whole, so the last piece is either empty or torn.
    return [
        _decode(line, path, number)
        for number, line in enumerate(lines[:-1], start=1)
        if line.strip()
    ]


def require_run(run_dir: Path) -> Record:
    """Contents of `run.json`. Raises UserError if the folder is not a run directory."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; expected the directory of a run")
    path = run_dir / "run.json"
    if not path.is_file():
        raise UserError(f"{run_dir}: is not the directory of a run (it has no run.json)")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: is not valid JSON ({error}); expected what zppo.launch wrote"
        ) from None


def summarise(run_dir: Path) -> Record:
    """The stable keys of one run. Accuracies that were never measured are None. Raises UserError
    for a folder that is no run."""
    run = require_run(run_dir)
    steps = read_lines(run_dir / "metrics.jsonl")
    return {
        "run": run.get("run_id"),
        "method": topology_value(run, "method", "name", default="zppo"),
        **step_totals(steps),
        **_fates(read_lines(run_dir / "fates.jsonl")),
        **_heldout(read_lines(run_dir / "heldout.jsonl")),
        **_ledger(run_dir, max((line["step"] + 1 for line in steps), default=0)),
    }


def step_totals(steps: Sequence[Mapping[str, Any]]) -> Record:
    """Sums and extremes over the step lines of `metrics.jsonl`."""

    def total(name: str) -> int:
        return int(sum(line.get(name, 0) for line in steps))

    first, last = accuracy_ends(steps)
    return {
        "steps": len(steps),
        "questions_new": total("window/new"),
        "questions_replayed": total("window/replayed"),
        **{
            f"groups_{kind}": total(f"window/{kind}")
            for kind in ("bcq", "ncq", *_other_kinds(steps))
        },
        "max_staleness_seen": max((line.get("staleness/max", 0) for line in steps), default=0),
        "accuracy_first": first,
        "accuracy_last": last,
        "tokens_generated": total("tokens/generated"),
        "updates": total("train/updates")
        if any("train/updates" in line for line in steps)
        else None,
        **_responses(steps),
        **_failures(steps),
        "wall_seconds": max((line.get("wall_seconds", 0.0) for line in steps), default=0.0),
    }


def _responses(steps: Sequence[Mapping[str, Any]]) -> Record:
    """Shares of the student's responses, means over the steps that measured them."""
    names = {
        "answers_missing": "answers/missing",
        "truncated": "length/truncated",
        "answers_timed_out": "answers/timed_out",
    }
    known = {key: [line[name] for line in steps if name in line] for key, name in names.items()}
    return {key: sum(v) / len(v) if v else None for key, v in known.items()}


def _failures(steps: Sequence[Mapping[str, Any]]) -> Record:
    by_kind: Counter[str] = Counter()
    by_actor: Counter[str] = Counter()
    for line in steps:
        for kind, actor, tries in failed_tries(line):
            by_kind[kind] += tries
            by_actor[actor] += tries
    return {"failed_tasks": dict(by_kind), "failed_tasks_by_actor": dict(by_actor)}


def _other_kinds(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(kind for line in steps for kind in reformulated_kinds(line))
    return [kind for kind in kinds if kind not in ("bcq", "ncq")]


def accuracy_ends(steps: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Accuracy at the start and at the end of a run: the mean over its first and last tenth (one
    step at least).

    New questions only, because replayed ones are hard by selection and would hide what was learnt.
    """
    values = [plain_accuracy(line) for line in steps]
    return ends([float(value) for value in values if value is not None])


def plain_accuracy(line: Mapping[str, Any]) -> float | None:
    """A step's accuracy on new questions; on all, where it had none that were new."""
    return line.get("accuracy/new", line.get("accuracy/plain"))


def ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean over the first and the last tenth of a series, one value at least; None if it is empty.

    What every place of this project means by "first → last".
    """
    if not values:
        return None, None
    width = max(1, round(len(values) / 10))
    return sum(values[:width]) / width, sum(values[-width:]) / width


def end_gauges(kind: str, values: Sequence[float]) -> dict[str, float]:
    """The two ends under their names in the live view, `accuracy_first_bcq` and so on."""
    first, last = ends(values)
    return (
        {}
        if first is None or last is None
        else {f"accuracy_first_{kind}": first, f"accuracy_last_{kind}": last}
    )


def topology_value(run: Record, *path: str, default: Any = None) -> Any:
    """A value of the resolved topology in `run.json`, or the default if any part of the path is
    absent."""
    node: Any = run.get("topology", {})
    for key in path:
        if not isinstance(node, dict) or node.get(key) is None:
            return default
        node = node[key]
    return node


def _decode(line: bytes, path: Path, number: int) -> Record:
    required, shape = SHAPES[path.name]
    try:
        record: Record = msgspec.json.decode(line, type=shape)
        msgspec.convert(record, required)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}:{number}: is no line that a run writes ({error})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number}: is not a JSON object ({error})") from None
    return record


def _fates(fates: Sequence[Record]) -> Record:
    counts = Counter(fate["fate"] for fate in fates)
    entries = Counter(
        entry_name(fate["entry_accuracy"]) for fate in fates if fate["fate"] == "graduated"
    )
    return {
        **{name: counts[name] for name in ("admitted", "graduated", "evicted")},
        "graduated_by_entry_accuracy": dict(
            sorted(entries.items(), key=lambda item: float(item[0]))
        ),
    }


def _heldout(evaluations: Sequence[Record]) -> Record:
    """Accuracy before the first step and after the last; a run evaluated once has no `after`."""
    by_step = {line["step"]: line["accuracy"] for line in evaluations}
    last = max(by_step, default=0)
    return {"heldout_before": by_step.get(0), "heldout_after": by_step[last] if last > 0 else None}


def _ledger(run_dir: Path, steps: int) -> Record:
    """What the journal vouches for, and from which step on."""
    ledger = read_ledger(run_dir, steps)
    return {
        "trained_twice": ledger.trained_twice,
        "lost": ledger.lost,
        "journal_from_step": ledger.from_step,
        "journal_problem": ledger.problem,
        "verdict": ledger.verdict,
        "teacher_requests": {kind: cost.requests for kind, cost in ledger.spent.items()},
        "teacher_tokens": {kind: cost.tokens for kind, cost in ledger.spent.items()},
    }
