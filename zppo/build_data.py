"""`zppo build-data`: a corpus of questions from raw data sets, by the rules of a recipe.

Each source of the recipe is an option: `zppo build-data --recipe zppo77k --vero FOLDER
--mmfinereason FOLDER --tokenizer FOLDER --out OUT`. What was done is kept when it is stopped, and
the same command goes on. Exit codes: 0 the corpus is whole, 1 it could not be written, 2 a user
error, 130 stopped.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from zppo.curation.build import Order, build
from zppo.curation.recipe import Recipe, read_recipe, recipe_text, shipped
from zppo.curation.report import report_text
from zppo.curation.sieve import PromptLengths
from zppo.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Parser,
    UserError,
    first_line,
    run_command,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        recipe_name, recipe, arguments = _read(sys.argv[1:] if argv is None else argv)
        if arguments.show_recipe:
            print(recipe_text(recipe_name), end="")
            return 0
        return _build(read_order(recipe_name, recipe, arguments), arguments.json)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def _build(order: Order, as_json: bool) -> int:
    kept = f"what was done is kept in {order.out}: the same command goes on"
    try:
        report = build(order, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print(f"stopped; {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (OSError, sqlite3.Error) as error:
        print(f"{_culprit(order, error)} ({first_line(error)}); {kept}", file=sys.stderr)
        return EXIT_FAILED
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print(report_text(report), end="")
    return 0


def _culprit(order: Order, error: Exception) -> str:
    """What could not be done: a source may vanish, or become unreadable, while it is read."""
    path = Path(str(getattr(error, "filename", None) or order.out)).absolute()
    for source, folder in order.folders.items():
        if path.is_relative_to(folder.absolute()):
            return f"{_option(source)} {folder}: {path.name} cannot be read"
    return f"--out {order.out}: cannot be written"


def read_order(name: str, recipe: Recipe, arguments: argparse.Namespace) -> Order:
    """The order that the command line gives. Raises UserError."""
    folders = {source: getattr(arguments, source) for source in recipe.sources}
    missing = [source for source, folder in folders.items() if folder is None]
    if missing:
        raise UserError(
            f"zppo build-data: the recipe {name} reads {' and '.join(recipe.sources)}; expected "
            f"{' and '.join(f'{_option(source)} FOLDER' for source in missing)}"
        )
    if arguments.out is None:
        raise UserError("zppo build-data: expected --out FOLDER, where the corpus is to be")
    limit, tokenizer = recipe.filters.max_prompt_tokens, arguments.tokenizer
    if limit is not None and tokenizer is None:
        raise UserError(
            f"zppo build-data: the recipe {name} takes prompts of up to {limit} tokens; expected "
            "--tokenizer FOLDER, the model folder whose tokens they are"
        )
    lengths = PromptLengths.of(tokenizer, arguments.templates) if limit is not None else None
    return Order(
        name=Path(name).stem, recipe=recipe, folders=folders, lengths=lengths, out=arguments.out
    )


def _read(argv: Sequence[str]) -> tuple[str, Recipe, argparse.Namespace]:
    """The recipe first, because its sources are options. Raises UserError."""
    early = Parser(prog="zppo build-data", add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    name = early.parse_known_args(argv)[0].recipe
    if name is None:
        _parser([]).parse_args(argv)  # shows the help, or says what is missing
    recipe = read_recipe(str(name))
    return str(name), recipe, _parser(list(recipe.sources)).parse_args(argv)


def _parser(sources: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo build-data",
        allow_abbrev=False,  # a source may be called `rec`
        description="A corpus of questions from raw data sets, by the rules of a recipe.",
        epilog="exit codes: 0 whole, 1 not written, 2 user error, 130 stopped (docs/corpus.md)",
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="RECIPE",
        help=f"a YAML file, or the name of one that ships: {', '.join(shipped())}",
    )
    parser.add_argument(
        "--show-recipe", action="store_true", help="print the recipe, as a start for your own"
    )
    if not sources:
        parser.add_argument("--SOURCE", metavar="FOLDER", help="each source of the recipe")
    for source in sources:
        parser.add_argument(
            _option(source), dest=source, type=Path, metavar="FOLDER", help="a source"
        )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="model folder, for the limit on prompts"
    )
    parser.add_argument(
        "--templates", type=Path, metavar="FOLDER", help="folder with plain.j2 (docs/templates.md)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the corpus is to be")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _option(source: str) -> str:
    return f"--{source.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(run_command(main))
