"""`python -m zppo.launch`: check everything, make the run directory, and become the run's supervisor.

Until the run directory is made nothing is written and nothing is started, so a mistake leaves no trace: one sentence on
stderr and exit code 2. The supervisor replaces this process (same process id, same terminal).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console

from zppo import checkpoint, run_dir
from zppo.config import Topology
from zppo.data import Corpus, bad_rows_text, held_out_overlap, load_questions
from zppo.errors import UserError
from zppo.plan import Plan, make_plan, measure_machine, wants_gpu
from zppo.plan_view import show
from zppo.processes import cores
from zppo.prompts import PromptSet
from zppo.topology import load, override, resolve, run_directory

EXIT_USER_ERROR = 2
FIXED = {
    "method": "the trained steps were made by another recipe",
    "data": "the data cursor counts questions of another corpus",
    "student": "the checkpoint holds another student",
    "run.seed": "the order of the corpus would change in the middle",
    "optimizer.state_dtype": "the checkpoint holds optimizer states of another kind",
}
"""Settings that a resumed run must keep, and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, resume or only show a run. Returns 2 after a user error, 0 after `--dry-run`; else it does not return."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.resume is not None:
            return _resume(arguments)
        return _launch(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.topology is None:
        raise UserError("--topology is missing; expected a topology file (write one with: zppo init topology.yaml)")
    topology = load(arguments.topology, arguments.set)
    directory = run_directory(topology)
    if directory.exists():
        raise UserError(run_dir.in_the_way(directory))
    corpus, plan = _check(topology)
    if arguments.dry_run:
        show(plan, directory, Console())
        return 0
    run_dir.create(directory, topology)
    if corpus.bad_rows:
        (directory / "bad_rows.txt").write_text(bad_rows_text(corpus), encoding="utf-8")
    become_supervisor(directory)


def _resume(arguments: argparse.Namespace) -> int:
    directory = _resumed_directory(arguments)
    record = run_dir.read(directory)
    _check_free(directory)
    found = checkpoint.find_latest(directory)
    if found.folder is None:
        torn = f" ({found.warnings[0]})" if found.warnings else ""
        problem = f"has no whole checkpoint to continue from{torn}"
        raise UserError(f"--resume: {str(directory)!r} {problem}; remove it to begin anew")
    topology = _resumed_topology(arguments, record.topology)
    _check_steps(topology, found.step)
    _, plan = _check(topology)
    for warning in found.warnings:
        print(warning, file=sys.stderr)
    if arguments.dry_run:
        show(plan, directory, Console())
        return 0
    run_dir.renew(directory, found.step, topology)
    become_supervisor(directory)


def become_supervisor(directory: Path) -> NoReturn:
    """Replace this process by the supervisor of the run in `directory`."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-P", "-m", "zppo_actors", "supervisor", "--run", str(directory)]
    os.execv(sys.executable, command)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check(topology: Topology) -> tuple[Corpus, Plan]:
    """Everything that can be wrong with settings, data, templates, models and machine. Raises UserError."""
    corpus = load_questions(topology.data.train, topology.data, Path.cwd())
    _check_media("data.train", corpus, topology)
    if topology.data.heldout is not None:
        heldout = load_questions(topology.data.heldout, topology.data, Path.cwd())
        _check_media("data.heldout", heldout, topology)
        _check_overlap(corpus, heldout)
    templates = Path(topology.data.templates) if topology.data.templates else None
    PromptSet(templates, topology.data.system_prompt).validate()
    machine = measure_machine(cores(), run_dir.runtime_base(), wants_gpu(topology))
    return corpus, make_plan(topology, len(corpus.questions), machine)


def _check_media(where: str, corpus: Corpus, topology: Topology) -> None:
    first = next((question.id for question in corpus.questions if question.media), None)
    if first is not None:
        raise UserError(
            f"{where}: the question {first!r} has pictures; expected text only, because the engine "
            f"{topology.actors.rollout.engine!r} cannot show them to the model"
        )


def _check_overlap(train: Corpus, heldout: Corpus) -> None:
    shared = held_out_overlap(train.questions, heldout.questions)
    if shared:
        raise UserError(
            f"data.heldout: {len(shared)} of its questions are in data.train too, first the training question "
            f"{shared[0]!r}; expected none in both"
        )


def _resumed_directory(arguments: argparse.Namespace) -> Path:
    if arguments.resume:
        return Path(arguments.resume).expanduser().absolute()
    if arguments.topology is None:
        raise UserError("--resume: expected a run directory, or the --topology of the run")
    return run_directory(load(arguments.topology, arguments.set))


def _check_free(directory: Path) -> None:
    lock = run_dir.hold(directory)
    if lock is None:
        raise UserError(f"--resume: {str(directory)!r} is in use by a run that has not ended")
    os.close(lock)


def _resumed_topology(arguments: argparse.Namespace, old: Topology) -> Topology:
    """The topology to go on with. Raises UserError where it would not be the same run."""
    if arguments.topology is not None:
        new = load(arguments.topology, arguments.set)
    else:
        new = resolve(override(old, arguments.set), Path.cwd())
    for path, reason in FIXED.items():
        if _at(old, path) != _at(new, path):
            setting, before, after = _difference(path, _at(old, path), _at(new, path))
            change = f"{setting} was {before!r} and is now {after!r}"
            raise UserError(f"--resume: {change}; it cannot change, because {reason}")
    if new.scheduler.max_staleness < old.scheduler.max_staleness:
        raise UserError(
            f"--resume: scheduler.max_staleness was {old.scheduler.max_staleness} and is now "
            f"{new.scheduler.max_staleness}; it cannot shrink, because windows in flight keep to the old bound"
        )
    return new


def _check_steps(topology: Topology, step: int) -> None:
    if topology.run.steps is not None and topology.run.steps <= step:
        raise UserError(
            f"--resume: run.steps is {topology.run.steps} and the run has reached step {step}; "
            "extend it, for example with --set run.steps=" + str(2 * step)
        )


def _at(topology: Topology, path: str) -> Any:
    value: Any = msgspec.to_builtins(topology)
    for key in path.split("."):
        value = value[key]
    return value


def _difference(path: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first setting below `path` that differs, with its old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return _difference(f"{path}.{key}", old.get(key), new.get(key))
    return path, old, new


class _Parser(argparse.ArgumentParser):
    """Reports a mistake on the command line as one sentence, like every other user error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zppo launch", description="Start a run as a topology describes it, or continue one.")
    parser.add_argument("--topology", type=Path, metavar="FILE", help="the run, in YAML (see: zppo init)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one setting, e.g. run.steps=100; may be repeated",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help="continue from the last whole checkpoint of RUN_DIR, or of the run that --topology names",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the resolved plan and start nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
