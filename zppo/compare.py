"""`python -m zppo.compare`: run several methods with several seeds under one topology, and report
what they show.

Each run is a `python -m zppo.launch` of its own, one after another, its output in a log instead of
a live view. Nothing is started before every method has passed the checks of a launch. Ctrl-C once
lets the run at work write its checkpoint; twice stops it at once. The same command goes on where it
was left, and `--report-only` reports on what is there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from zppo import launch
from zppo.comparison import record as records
from zppo.comparison import runs
from zppo.comparison.record import Pair, Record
from zppo.config.load import run_folder
from zppo.config.topology import Topology
from zppo.config.typed import setting_typed
from zppo.data.question import digest
from zppo.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Parser,
    UserError,
    run_command,
)
from zppo.plan.machine import measure_machine, wants_gpu
from zppo.plan.make import make_plan
from zppo.plan.processes import cores
from zppo.records import run_directory
from zppo.signals import Interrupts, die_with_parent

POLL_SECONDS = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every run is finished, 1 when some failed, 2 after a user error, 130 when
    interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.report_only:
            out = _folder(arguments)
            _report(out, _with_choices(records.read_record(out), arguments))
            return 0
        return _compare(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def _compare(arguments: argparse.Namespace) -> int:
    record, out = _order(arguments), _folder(arguments)
    if (out / records.RECORD).exists():
        record = records.merge(records.read_record(out), record, out)
    record = _with_choices(record, arguments)
    _check_out(out)
    wanted = [
        pair
        for pair in record.pairs()
        if pair.method in arguments.methods and pair.seed in arguments.seeds
    ]
    _check_free(out, wanted)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    lock = run_directory.hold(out)
    if lock is None:
        raise UserError(f"--out {str(out)!r}: is in use by a comparison that has not ended")
    try:
        records.write_record(out, record)
        if not Session(out, record, arguments.topology, arguments.set).run(wanted):
            print(
                f"interrupted; continue with the same command: {_same_command(arguments)}",
                flush=True,
            )
            print(
                "or report on what is there: zppo compare --report-only --out "
                f"{shlex.quote(str(out))}"
            )
            return EXIT_INTERRUPTED
        _report(out, record)
    finally:
        os.close(lock)
    return EXIT_FAILED if any(pair.name in record.failures for pair in wanted) else 0


def _report(out: Path, record: Record) -> None:
    # matplotlib takes a second to import, which a refused command should not pay.
    from zppo.comparison.report import write_report

    for path in write_report(out, record):
        print(f"wrote {path}")


# ---- checks --------------------------------------------------------------------------------------


def _order(arguments: argparse.Namespace) -> Record:
    """What is asked for, checked as far as it can be without running. Raises UserError."""
    if arguments.topology is None:
        raise UserError(
            "--topology is missing; expected a topology file (write one with: zppo init "
            "topology.yaml)"
        )
    if arguments.methods is None or arguments.seeds is None:
        missing = "--methods" if arguments.methods is None else "--seeds"
        raise UserError(
            f"{missing} is missing; expected, for example, --methods grpo,grpo_replay,zppo --seeds "
            "0,1,2"
        )
    arguments.methods = records.parse_methods(arguments.methods)
    arguments.seeds = records.parse_seeds(arguments.seeds)
    topology = records.shared_topology(arguments.topology, arguments.set)
    out = _folder(arguments)
    topologies = [
        records.of_pair(topology, Pair(method, arguments.seeds[0]), out)
        for method in arguments.methods
    ]
    corpus, steps = _check_methods(topologies)
    return Record(
        source=str(arguments.topology),
        overrides=arguments.set,
        topology=topology,
        corpus=corpus,
        steps=steps,
        sizes=records.sizes_of(topologies),
        methods=arguments.methods,
        seeds=arguments.seeds,
        baseline=arguments.methods[0],
    )


def _with_choices(record: Record, arguments: argparse.Namespace) -> Record:
    """The record with what this call says about the report. Raises UserError for a baseline that is
    not compared."""
    baseline = records.parse_baseline(arguments.baseline or record.baseline, record.methods)
    return replace(record, baseline=baseline, budget=arguments.metric_budget or record.budget)


def _check_methods(topologies: Sequence[Topology]) -> tuple[str, int]:
    """Every method passes the checks of a launch. Returns the digest of the questions and the steps
    of a run."""
    first, *others = topologies
    checked = launch.check(first)
    questions = checked.corpus.questions
    if others:
        base = run_directory.runtime_base()
        machine = measure_machine(cores(), base, run_folder(first), wants_gpu(first))
    for other in others:
        launch.check_vocabularies(other, make_plan(other, len(questions), machine).method)
    return digest(questions), checked.plan.windows.steps


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return Path(arguments.out).expanduser().absolute()
    if arguments.topology is None:
        raise UserError("--out is missing; expected the folder of a comparison")
    return Path("runs", f"compare-{arguments.topology.stem}").absolute()


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r}: is a file; expected a folder, or a new name")
    if out.is_dir() and not (out / records.RECORD).exists() and any(out.iterdir()):
        raise UserError(
            f"--out {str(out)!r}: holds files but no comparison; expected one, or a new name"
        )


def _check_free(out: Path, pairs: Sequence[Pair]) -> None:
    for directory in (records.run_folder(out, pair) for pair in pairs):
        if directory.is_dir():
            lock = run_directory.hold(directory)
            if lock is None:
                raise UserError(
                    f"--out {str(out)!r}: the run {directory.name!r} in it has not ended; wait for "
                    "it"
                )
            os.close(lock)


# ---- runs ----------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)


class Session:
    """One call's runs, one after another."""

    def __init__(self, out: Path, record: Record, topology: Path, overrides: Sequence[str]) -> None:
        self._out, self._record, self._topology, self._overrides = out, record, topology, overrides
        self._interrupts = Interrupts()

    def run(self, pairs: Sequence[Pair]) -> bool:
        """Finish every pair or note why it failed. False when interrupted."""
        clock = runs.Clock(total=len(pairs))
        with self._interrupts.listening():
            for number, pair in enumerate(pairs, start=1):
                progress = runs.progress_of(records.run_folder(self._out, pair))
                if progress.state == "finished":
                    self._record.failures.pop(pair.name, None)
                    say(runs.kept_line(number, clock, pair, progress))
                    continue
                say(runs.begin_line(number, clock, pair, progress.state, pairs[number - 1 :]))
                self._one(number, clock, pair, progress.state)
                records.write_record(self._out, self._record)
                if self._interrupts.count:
                    return False
        return True

    def _one(self, number: int, clock: runs.Clock, pair: Pair, state: runs.State) -> None:
        directory = records.run_folder(self._out, pair)
        if state == "stranded":
            say(
                f"  {pair.name} has no checkpoint and begins anew; kept as "
                f"{runs.set_aside(directory).name}"
            )
        begin, log = time.monotonic(), self._out / "logs" / f"{pair.name}.log"
        said = log.stat().st_size if log.exists() else 0
        exit_code = self._launch(
            runs.command(pair, state, self._topology, self._overrides, self._out), log, pair
        )
        seconds = time.monotonic() - begin
        if runs.progress_of(directory).state == "finished":
            clock.seconds[pair] = seconds
            self._record.failures.pop(pair.name, None)
            say(runs.end_line(number, clock, pair, directory, seconds))
        elif not self._interrupts.count:
            reason = runs.reason(
                directory, log.read_bytes()[said:].decode(errors="replace"), exit_code
            )
            self._record.failures[pair.name] = reason
            say(runs.failed_line(number, clock, pair, reason))

    def _launch(self, command: Sequence[str], log: Path, pair: Pair) -> int:
        """Run one child to its end. In a session of its own, so that each Ctrl-C reaches it once,
        from here.

        Should this process be killed, the child is asked to stop, so that no run goes on unseen.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )
        shown, told = 0, 0
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            shown = self._show_steps(pair, shown)
            if told < self._interrupts.count:
                # SIGTERM first, which the run takes for the one that it may have been sent as well;
                # then another, because two of one signal that come together are one.
                process.send_signal((signal.SIGTERM, signal.SIGINT)[told % 2])
                told += 1
                if told == 1:
                    say(
                        "stopping: the run finishes its step and writes a checkpoint; Ctrl-C again "
                        "stops it at once"
                    )
        if shown:
            print("\r\033[K", end="", flush=True)
        return process.returncode

    def _show_steps(self, pair: Pair, shown: int) -> int:
        """On a terminal, how far the run at work is; elsewhere one line a run is enough."""
        if not sys.stdout.isatty():
            return 0
        file = records.run_folder(self._out, pair) / "metrics.jsonl"
        steps = file.read_bytes().count(b"\n") if file.exists() else 0
        if steps != shown:
            print(
                f"\r\033[K  {pair.name}: step {steps} of {self._record.steps}", end="", flush=True
            )
        return steps


# ---- the command line ----------------------------------------------------------------------------


def _same_command(arguments: argparse.Namespace) -> str:
    parts = ["--topology", str(arguments.topology), "--methods", ",".join(arguments.methods)]
    parts += ["--seeds", ",".join(map(str, arguments.seeds))]
    parts += [part for setting in arguments.set for part in ("--set", setting)]
    parts += ["--baseline", arguments.baseline] if arguments.baseline else []
    parts += ["--out", str(arguments.out)] if arguments.out else []
    return "zppo compare " + " ".join(map(shlex.quote, parts))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo compare",
        description="Compare methods under one topology, with several seeds.",
        settings=setting_typed,
    )
    parser.add_argument(
        "--topology", type=Path, metavar="FILE", help="what all runs share, in YAML"
    )
    parser.add_argument(
        "--methods", metavar="NAMES", help="methods with commas between, e.g. grpo,grpo_replay,zppo"
    )
    parser.add_argument("--seeds", metavar="NUMBERS", help="seeds, e.g. 0,1,2 or 0-7")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the comparison (default: runs/compare-TOPOLOGY)"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="what others are compared with (default: the first method)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one setting of all runs; repeatable",
    )
    parser.add_argument(
        "--metric-budget",
        choices=("steps", "compute"),
        help=(
            "the equal budget whose accuracies the report puts first (default: steps); it shows "
            "both"
        ),
    )
    parser.add_argument(
        "--report-only", action="store_true", help="start no run, report on those that are there"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
