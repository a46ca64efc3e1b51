"""`python -m zppo.report RUN`: write the page of a run, or print its summary as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from zppo.diagnosis.examine import diagnosed
from zppo.errors import Parser, UserError
from zppo.records.atomic_file import written_whole
from zppo.report.load import load_run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr when the folder is not a run."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.json:
            print(
                msgspec.json.format(
                    msgspec.json.encode(diagnosed(arguments.run)), indent=2
                ).decode()
            )
        if arguments.out is not None or not arguments.json:
            path = write_report(
                arguments.run, arguments.out or arguments.run / "report" / "index.html"
            )
            print(f"report: {path}", file=sys.stderr if arguments.json else sys.stdout)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_report(run_dir: Path, out: Path) -> Path:
    """Make the page and put it at `out`, whole or not at all. Raises UserError if the run or `out`
    cannot be used."""
    # matplotlib takes a second to import, which `--json` should not pay.
    from zppo.report.page import render_page

    page = render_page(load_run(run_dir))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="zppo report", description="Report on a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the summary as JSON (no page unless --out is given)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: RUN/report/index.html)"
    )
    return parser
