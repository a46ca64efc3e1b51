"""`zppo doctor RUN`: what is wrong with a run, live or finished, and which setting to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from zppo.diagnosis.examine import diagnosed
from zppo.errors import EXIT_FAILED, EXIT_USER_ERROR, Parser, UserError, count_of, printable
from zppo.records.summary import Record

SHOWN = ("run", "steps", "verdict", "advice")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if an advisory is severe, 2 when the folder is not a run."""
    try:
        arguments = _parser().parse_args(argv)
        summary = diagnosed(arguments.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments.json:
        shown = {name: summary[name] for name in SHOWN}
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
    else:
        print(printable("\n".join(report_lines(summary))))
    severe = any(advisory["severity"] == "severe" for advisory in summary["advice"])
    return EXIT_FAILED if severe else 0


def report_lines(summary: Record) -> Iterator[str]:
    """The findings in plain text: three lines for each."""
    advice = summary["advice"]
    steps = count_of(summary["steps"], "trained step")
    many = count_of(len(advice), "advisory", "advisories") if advice else "no advisories"
    yield f"run {summary['run']}: {steps}, {many}"
    for advisory in advice:
        yield f"{advisory['severity']} {advisory['rule']}: {advisory['found']}"
        yield f"  {advisory['change']}"
        yield f"  settings: {', '.join(advisory['settings'])}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo doctor",
        description="What is wrong with a run, live or finished, and which setting to change.",
        epilog="Exit code: 0 if nothing severe is found, 1 if an advisory is severe, 2 if RUN is "
        "not a run directory. The rules are in docs/metrics.md.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print the advisories as JSON")
    return parser
