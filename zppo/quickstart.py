"""`zppo quickstart`: the small world of the examples, trained with ZPPO and reported on, from the
package alone.

The run is a `python -m zppo.launch` with this terminal, because a launch becomes the supervisor and
does not come back to write a report.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from zppo.errors import EXIT_FAILED, EXIT_USER_ERROR, Parser, UserError, run_command
from zppo.report import cli as report
from zppo.signals import die_with_parent

TOPOLOGY = (Path(__file__).with_name("examples") / "quickstart.yaml").resolve()
"""`examples` is a link to the folder at the root of the repository, and a folder in a wheel; a run
by way of the link would be another than one of `examples/quickstart.yaml`."""
DIRECTORY = "runs/quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and report. Returns the exit code of the run where it is not 0, else that of the
    report."""
    try:
        arguments = _parser().parse_args(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    settings = [f"run.directory={arguments.directory}", *arguments.set]
    given = [part for setting in settings for part in ("--set", setting)]
    code = _run([sys.executable, "-P", "-m", "zppo.launch", str(TOPOLOGY), *given])
    return code or report.main([arguments.directory])


def _run(command: Sequence[str]) -> int:
    """One child to its end. Ctrl-C reaches it from the terminal, SIGTERM and SIGHUP from here."""
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, signal.SIGTERM))

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # Handlers, because a signal that is ignored here would be ignored by the child as well. Under
    # nohup it ignores the SIGHUP that is passed on.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGHUP: signal.signal(signal.SIGHUP, pass_on),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo quickstart",
        description="Train a small student with ZPPO on this machine's CPU and write the report.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default=DIRECTORY,
        metavar="RUN_DIR",
        help=f"where the run is kept (default: {DIRECTORY})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one setting of its topology, e.g. run.steps=20; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
