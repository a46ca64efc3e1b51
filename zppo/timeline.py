"""`python -m zppo.timeline RUN`: who worked, who waited, for whom, in words and as a Chrome trace.

The trace opens in https://ui.perfetto.dev and in `chrome://tracing`. Exit codes: 0, or 2 after one
sentence when there is nothing to show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from zppo.config.options import seconds
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, run_command
from zppo.records.atomic_file import written_whole
from zppo.records.summary import read_lines, require_run
from zppo.records.timeline import TIMELINE, Timeline, last, read_timeline
from zppo.records.trace import chrome_trace
from zppo.records.work import sentence_of, shares_of, work_of


def main(argv: Sequence[str] | None = None) -> int:
    """Write the trace of a run and say what it shows; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        run = require_run(arguments.run)
        timeline = _timeline(arguments.run, arguments.last)
        out = arguments.out or arguments.run / TIMELINE / "trace.json"
        lines = _said(timeline)
        steps = read_lines(arguments.run / "metrics.jsonl")
        staleness = {s["step"]: s["staleness/mean"] for s in steps if "staleness/mean" in s}
        trace = chrome_trace(timeline, staleness, {"run": run.get("run_id"), "summary": lines})
        _write(out, msgspec.json.encode(trace))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    print("\n".join([*lines, f"trace: {out}"]))
    return 0


def _timeline(run_dir: Path, newest: float | None) -> Timeline:
    timeline = read_timeline(run_dir)
    if timeline is None:
        raise UserError(
            f"{run_dir}: has no timeline (the folder {TIMELINE}/ is missing or empty); expected a "
            "run whose processes have begun, of a version that records one"
        )
    return timeline if newest is None else last(timeline, newest)


def _said(timeline: Timeline) -> list[str]:
    work = work_of(timeline)
    if work is None:
        return ["The trainer has neither worked nor waited yet."]
    lines = [sentence_of(work), shares_of(work)]
    if timeline.unreadable:
        lines.append(f"Lines that could not be read and were left out: {timeline.unreadable}.")
    return lines


def _write(out: Path, data: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo timeline",
        description="Who worked, who waited, for whom; and a trace for ui.perfetto.dev.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the trace (default: RUN/timeline/trace.json)"
    )
    parser.add_argument(
        "--last", type=seconds, metavar="SECONDS", help="only the end of the timeline"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
