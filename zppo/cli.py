"""The console script `zppo`: a short way to the doors of the package.

`zppo launch …` is `python -m zppo.launch …`, `zppo report …` is `python -m zppo.report …`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from zppo.errors import EXIT_USER_ERROR, Parser, UserError, closest, nearest, run_command

USAGE = """\
usage: zppo COMMAND …

  zppo quickstart                  train a small student in a small world on this machine, and report on it
  zppo init [FILE]                 write a commented topology with every setting (default: topology.yaml); --like trl
                                   or --like verl: with the names that it has there
  zppo data DATA                   what a source of questions holds, and what a model would see of it
  zppo build-data --recipe RECIPE  a corpus from raw data sets, by the rules of a recipe (zppo77k: the paper's)
  zppo sample-videos ROWS          the videos of a question file, sampled to frames once and for all
  zppo launch FILE                 start a run; add --dry-run to see the plan, --resume to continue a run
  zppo join --key KEY_FILE         run what a run wants on this host, as one of its further hosts
  zppo render FILE --as SCHEDULER  a run of several hosts as a job for slurm or kubernetes
  zppo plan FILE                   the plan of a run; with --from-run RUN, --calibrate or --calibration FILE how long it
                                   takes and what would be faster
  zppo evaluate --model FOLDER     accuracy of a checkpoint, a model or a server on a question set
  zppo evaluate FOLDER --suite S   a suite of benchmarks (paper, llm, vlm, video, or a table of yours) over lm-eval and lmms-eval
  zppo compare --topology FILE     run several --methods with several --seeds and report what they show
  zppo grade --audit SOURCE        how often the grader of a source errs, on completions whose truth is known
  zppo report RUN_DIR              write the report of a run as one HTML page; --json prints its summary
  zppo timeline RUN_DIR            who worked, who waited, for whom; and a trace for ui.perfetto.dev
  zppo doctor RUN_DIR              what is wrong with a run, and which setting to change
  zppo --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    try:
        if command not in COMMANDS:
            raise UserError(f"zppo: there is no command {command!r}{nearest(command, COMMANDS)}")
        return COMMANDS[command](rest)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def console() -> int:
    """The console script: one command, in a process of its own."""
    return run_command(_run)


def _run() -> int:
    if sys.argv[1:2] and sys.argv[1] in READ_TOKENIZERS:
        # Imported late: the other commands read no tokenizer.
        from zppo.prompting.tokenization import run_no_models

        run_no_models()
    return main()


def _init(arguments: list[str]) -> int:
    parser = Parser(prog="zppo init", description="Write a commented topology to a new file.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("topology.yaml"), metavar="FILE")
    parser.add_argument(
        "--like", metavar="TOOL", help="trl or verl: its defaults, and its names in the comments"
    )
    asked = parser.parse_args(arguments)
    # Imported late: they read the whole configuration, which no other command needs here.
    from zppo.config.counterparts import TOOLS
    from zppo.config.template import write_topology

    like = next((tool for tool in TOOLS if tool == asked.like), None)
    if asked.like is not None and like is None:
        raise UserError(
            f"zppo init: --like is {asked.like!r}; expected one of {', '.join(TOOLS)}"
            f"{closest(asked.like, TOOLS)}"
        )
    write_topology(asked.file, like)
    print(
        f"wrote {asked.file}; name your questions and models in it, then: zppo launch {asked.file} "
        "--dry-run"
    )
    return 0


def _door(module: str) -> Callable[[list[str]], int]:
    """A command whose module is imported only when it is called."""

    def call(arguments: list[str]) -> int:
        exit_code: int = import_module(module).main(arguments)
        return exit_code

    return call


def _version(arguments: list[str]) -> int:
    # Imported late: until `console` runs, Ctrl-C prints a traceback.
    from importlib import metadata

    print(f"zppo {metadata.version('zppo')}")
    return 0


def _help(arguments: list[str]) -> int:
    print(USAGE, end="")
    return 0


DOORS = {
    "quickstart": "zppo.quickstart",
    "data": "zppo.data_command",
    "build-data": "zppo.build_data",
    "sample-videos": "zppo.sample_videos",
    "launch": "zppo.launch",
    "join": "zppo.join",
    "render": "zppo.render",
    "plan": "zppo.plan_command",
    "evaluate": "zppo.evaluate",
    "compare": "zppo.compare",
    "grade": "zppo.grade",
    "report": "zppo.report.cli",
    "timeline": "zppo.timeline",
    "doctor": "zppo.diagnosis.doctor",
}
READ_TOKENIZERS = ("build-data", "compare", "data", "evaluate", "launch", "plan")
"""They run no model themselves: what does is a process of its own."""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "--version": _version,
    "--help": _help,
    "-h": _help,
    **{name: _door(module) for name, module in DOORS.items()},
}


if __name__ == "__main__":
    sys.exit(console())
